"""Nodes that tell their segments in pieces, die and come back, servers that start again, in any order: the index is
what the nodes' memory holds."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.machines import longer, machine_settings
from support.metadata_words import granted, ids, in_pieces, new_state, piece, registration, reservation

from kvcore.types import ChunkKey
from metadata_server.account_messages import ImportRequest
from metadata_server.messages import HeartbeatRequest, LeaveRequest, ManifestEntry

NODE = st.sampled_from(("a", "b", "c"))
UNITS, PIECE = 12, 2


@dataclass
class Node:
    """A node's process: its memory by offset, and what it has still to tell."""

    name: str
    incarnation: int
    memory: dict[int, ManifestEntry] = field(default_factory=dict)
    known: bool = False
    """As far as it knows."""
    new: bool = True
    to_tell: list[ImportRequest] = field(default_factory=list)

    def entries(self) -> list[ManifestEntry]:
        return sorted(self.memory.values(), key=lambda entry: entry.generation)

    def twice(self) -> set[ChunkKey]:
        """Chunks of which an evicted copy is there besides: one of the two counts."""
        counts = Counter(entry.key for entry in self.memory.values())
        return {key for key, count in counts.items() if count > 1}


class ImportMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now, self.lives, self.incarnations = 0.0, count(1), count(1)
        self.nodes: dict[str, Node] = {}
        self.late: list[ImportRequest] = []
        self.restart()

    @rule()
    def restart(self) -> None:
        life = next(self.lives)
        self.state = new_state(epoch=f"e{life}", first_generation=life << 40, event_log=100_000)

    @rule(name=NODE)
    def start(self, name: str) -> None:
        """The node's process is started, again perhaps: its memory is new."""
        self.nodes[name] = Node(name, next(self.incarnations))

    @rule(name=NODE)
    def end(self, name: str) -> None:
        node = self.nodes.pop(name, None)
        if node is not None:
            self.state.leave(LeaveRequest(node_id=name, incarnation=node.incarnation), self.now)

    @rule(name=NODE, lost=st.sampled_from([False, False, False, True]))
    def step(self, name: str, lost: bool) -> None:
        """What `Membership` does: a heartbeat, or a registration whose answer may be lost."""
        node = self.nodes.get(name)
        if node is None:
            return
        beat = HeartbeatRequest(node_id=name, incarnation=node.incarnation)
        if node.known and self.state.heartbeat(beat, self.now).known:
            return
        request = registration(name, UNITS, node.incarnation, ttl_s=5.0)
        reply = self.state.register(request if node.new else in_pieces(request), self.now)
        node.new, node.known = False, not lost
        self.late += node.to_tell
        node.to_tell = []
        for number in () if lost else reply.wanted.values():
            entries = node.entries()
            node.to_tell = [
                piece(
                    name,
                    number,
                    entries[at : at + PIECE],
                    last=at + PIECE >= len(entries),
                    incarnation=node.incarnation,
                )
                for at in range(0, len(entries) or 1, PIECE)
            ]

    @rule(name=NODE, lost=st.booleans())
    def tell(self, name: str, lost: bool) -> None:
        node = self.nodes.get(name)
        if node is None or not node.to_tell:
            return
        request = node.to_tell[0]
        reply = self.state.import_piece(request, self.now)
        assert reply.refused <= len(request.entries) - len({e.key for e in request.entries} - node.twice())
        if lost:
            return
        self.late.append(node.to_tell.pop(0))
        if not reply.known:
            node.known, node.to_tell = False, []

    @precondition(lambda self: self.late)
    @rule(data=st.data())
    def tell_late(self, data: st.DataObject) -> None:
        """A piece that was on its way for long."""
        self.state.import_piece(data.draw(st.sampled_from(self.late)), self.now)

    @rule(name=NODE, numbers=st.lists(st.integers(0, 30), min_size=1, max_size=4, unique=True))
    def put(self, name: str, numbers: list[int]) -> None:
        node = self.nodes.get(name)
        if node is None:
            return
        replicas = granted(
            self.state.reserve(reservation(name, numbers, incarnation=node.incarnation, prefer=None), self.now)
        )
        written = []
        for replica in replicas:
            owner = self.nodes.get(replica.segment_id.partition(".")[0])
            if owner is None or f"{owner.name}.{owner.incarnation:x}" != replica.segment_id:
                continue  # nobody is there to write to
            entry = ManifestEntry(
                key=replica.key, offset=replica.offset, length=replica.length, generation=replica.generation
            )
            owner.memory[replica.offset] = entry
            written.append(replica)
        self.state.commit(ids(name, written, node.incarnation), self.now)

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0]))
    def advance(self, seconds: float) -> None:
        self.now += seconds

    def index(self) -> dict[str, dict[int, ManifestEntry]]:
        """What the server knows, by node and offset."""
        found: dict[str, dict[int, ManifestEntry]] = {}
        for segment in self.state.nodes(self.now).segments:
            record = self.state._nodes.segments[segment.id]
            found[segment.id] = {
                r.offset: ManifestEntry(key=r.key, offset=r.offset, length=r.length, generation=r.generation)
                for r in self.state._index.refs([*record.complete()])
            }
        return found

    @invariant()
    def nothing_is_known_that_is_not_there(self) -> None:
        self.state.check_invariants(self.now)
        for segment_id, entries in self.index().items():
            node = self.nodes.get(segment_id.partition(".")[0])
            if node is not None and segment_id == f"{node.name}.{node.incarnation:x}":
                assert entries.items() <= node.memory.items()

    def teardown(self) -> None:
        """Once the server is started anew and every node has told all, the index is the manifests."""
        self.restart()
        self.now += 1.0
        for name, node in self.nodes.items():
            node.known, node.new = False, False
            self.step(name, lost=False)
            while node.to_tell:
                self.tell(name, lost=False)
        known = self.index()
        for node in self.nodes.values():
            told = known.pop(f"{node.name}.{node.incarnation:x}")
            assert told.items() <= node.memory.items()
            assert {e.key for e in told.values()} == {e.key for e in node.memory.values()}
        assert known == {}
        assert self.state.stats(self.now, 0).rebuilding == 0


TestImportMachine = ImportMachine.TestCase
TestImportMachine.settings = machine_settings(20)
TestLongImportMachine = longer(ImportMachine, 40)
