"""Reservations of writers: granted, committed, given back, run out.

Owns their deadlines and their lists in the nodes. Invariants: a replica is RESERVED if and only if its live writer has
it in `reservations` and it has a deadline; the room of one that ended without a commit rests for the grace time.
"""

from collections import Counter
from collections.abc import Iterable, Set

from kvcore.config.schema import StoreConfig
from kvcore.types import ChunkKey
from metadata_server.index.leases import Deadlines, Expiry
from metadata_server.index.nodes import LiveNode, NodeRegistry
from metadata_server.index.placement import Placer
from metadata_server.index.replicas import ReplicaIndex, segments_of
from metadata_server.index.segments import Replica, ReplicaState, Writer
from metadata_server.messages import (
    CommitRefusal,
    CommitReply,
    ReplicaIds,
    ReserveItem,
    ReserveOutcome,
    ReserveReply,
    ReserveRequest,
    ReserveStatus,
)

_EXISTS = ReserveOutcome(status=ReserveStatus.EXISTS)
_FULL = ReserveOutcome(status=ReserveStatus.FULL)


class Reservations:
    """Mutated by MetadataState only, which lets run out what is due before each call."""

    def __init__(
        self, config: StoreConfig, nodes: NodeRegistry, index: ReplicaIndex, deadlines: Deadlines, counts: Counter[str]
    ) -> None:
        self._config = config
        self._nodes = nodes
        self._index = index
        self._deadlines = deadlines
        self._counts = counts

    def __len__(self) -> int:
        return sum(len(node.reservations) for node in self._nodes)

    def __repr__(self) -> str:
        return f"<Reservations {len(self)} open>"

    def reserve(self, request: ReserveRequest, now: float) -> ReserveReply:
        """See MetadataState.reserve."""
        node = self._nodes.get(request.node_id, request.incarnation)
        if node is None:
            self._counts["declined_unknown_writer"] += len(request.items)
            return ReserveReply(outcomes=[_FULL] * len(request.items))
        segments = self._nodes.segments
        prefer = segments.get(request.prefer_segment or "")
        owner = request.owner if isinstance(request.owner, bytes) else None
        own, there = node.segments.values(), segments.values()
        placer = Placer(self._config, prefer=prefer, own=own, segments=there, owner=owner)
        elsewhere = self._nodes.closed_segments()
        if request.only_preferred is True:
            # Into its own a drained node may still bring chunks from its disk, which others want to read there.
            by_name = {request.prefer_segment}
            elsewhere = (segments.keys() - by_name) | (elsewhere - (by_name & node.segments.keys()))
        for item in reversed(request.items):  # before any eviction: room for a prefix's tail must not cost its head
            for replica in self._index.complete.get(item.key, ()):
                replica.record.touch(replica)
                if owner is not None:
                    replica.record.own(replica, owner)
        outcomes, granted = [], []
        before: ChunkKey | None = None
        for item in request.items:
            parent, before = before, item.key if request.in_order is True else None
            writers = self._index.writers(item.key)
            result = self._reserve_one(item, parent, node, placer, elsewhere)
            if isinstance(result, Replica):
                granted.append(result)
                outcomes.append(ReserveOutcome(status=ReserveStatus.GRANTED, replica=result.ref, writers=writers))
            else:
                outcomes.append(result)
                self._counts[f"declined_{result.status.value}"] += 1
        self._counts["reserved"] += len(granted)
        for replica in granted:
            self._deadlines.set((Expiry.RESERVATION, replica.ref.id), now + request.ttl_s)
        return ReserveReply(outcomes=outcomes, segments=segments_of(granted))

    def commit(self, request: ReplicaIds) -> CommitReply:
        """See MetadataState.commit."""
        # Each id is one of four:
        # 1. a reservation of this writer: committed now;
        # 2. of this writer, and complete: committed before, or twice in this request. True again: a retry is harmless;
        # 3. of this writer, but ended (aborted, run out): its room may be another's soon, so false;
        # 4. another's, unknown, or of a writer that is not registered: false.
        node = self._nodes.get(request.node_id, request.incarnation)
        writer = Writer(request.node_id, request.incarnation)
        committed, fresh = list[bool](), dict[int, Replica]()
        for number in request.replica_ids:
            replica = self._index.replicas.get(number)
            if node is None or replica is None or replica.writer != writer:
                committed.append(False)
            elif node.reservations.pop(number, None):
                self._deadlines.drop((Expiry.RESERVATION, number))
                fresh[number] = replica
                committed.append(True)
            else:
                committed.append(number in fresh or replica.state is ReplicaState.COMPLETE)
        self._index.commit(list(fresh.values()))
        self._counts["committed"] += len(fresh)
        self._counts["commit_refused"] += committed.count(False)
        if all(committed):
            return CommitReply(committed=committed)
        why = CommitRefusal.WRITER_GONE if node is None else CommitRefusal.ENDED
        return CommitReply(committed=committed, refusals=[CommitRefusal.NONE if done else why for done in committed])

    def abort(self, request: ReplicaIds, now: float) -> None:
        """See MetadataState.abort."""
        node = self._nodes.get(request.node_id, request.incarnation)
        for number in request.replica_ids if node else ():
            replica = node.reservations.get(number) if node else None
            if replica is not None:
                self.end(replica, now)
                self._counts["aborted"] += 1

    def end(self, replica: Replica, now: float, *, writes_on: bool = False) -> None:
        """End one without a commit: its room rests, as a write that failed may still be landing. `writes_on`: its
        writer may know nothing of it, and write until the reservation's own time is up."""
        number = replica.ref.id
        if replica.writer is not None:
            self._nodes[replica.writer.node_id].reservations.pop(number)
        until = self._deadlines.at((Expiry.RESERVATION, number)) if writes_on else None
        self._deadlines.drop((Expiry.RESERVATION, number))
        self._deadlines.set((Expiry.RETIRED, number), (until or now) + self._config.retire_grace_s)
        self._index.retire(replica)

    def end_all_of(self, node: LiveNode, now: float, *, writes_on: bool) -> None:
        """End what the node has reserved anywhere. `writes_on` as of `end`."""
        for replica in list(node.reservations.values()):
            self.end(replica, now, writes_on=writes_on)

    def forget(self, replicas: Iterable[Replica]) -> None:
        """Forget those among the replicas of a segment that is dropped: there is no room that could rest."""
        for replica in replicas:
            number = replica.ref.id
            self._deadlines.drop((Expiry.RESERVATION, number))
            self._deadlines.drop((Expiry.RETIRED, number))
            if replica.state is ReplicaState.RESERVED and replica.writer is not None:
                self._nodes[replica.writer.node_id].reservations.pop(number)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        reserved = {number: replica for node in self._nodes for number, replica in node.reservations.items()}
        for number, replica in self._index.replicas.items():
            assert (replica.state is ReplicaState.RESERVED) == (number in reserved)
            assert ((Expiry.RESERVATION, number) in self._deadlines) == (replica.state is ReplicaState.RESERVED)
            assert ((Expiry.RETIRED, number) in self._deadlines) == (replica.state is ReplicaState.RETIRING)
        for number, replica in reserved.items():
            assert self._index.replicas[number] is replica and replica.writer is not None
            writer = replica.writer
            assert self._nodes.get(writer.node_id, writer.incarnation), "a reservation without its writer"

    def _reserve_one(
        self, item: ReserveItem, parent: ChunkKey | None, node: LiveNode, placer: Placer, elsewhere: Set[str]
    ) -> Replica | ReserveOutcome:
        """`parent`: what it continues, if that is known; `elsewhere`: segments in which no room is wanted."""
        # Four cases:
        # 1. A complete replica is there: nothing to write.
        # 2. It is being written by as many as are allowed, or in every segment there is: others are at it.
        # 3. No segment without a write of this key has room, even after eviction. What was evicted stays evicted.
        # 4. There is room: the replica is reserved in the writer's name.
        if item.key in self._index.complete:
            return _EXISTS
        writing = self._index.writing.get(item.key, ())
        taken = elsewhere | {replica.ref.segment_id for replica in writing} if writing else elsewhere
        if len(writing) >= self._config.max_replicas or (writing and len(taken) == len(self._nodes.segments)):
            return ReserveOutcome(status=ReserveStatus.BUSY, writers=self._index.writers(item.key))
        found = placer.place(item.length, taken)
        if placer.evicted:
            self._index.forget(placer.evicted)
            self._counts["evicted"] += len(placer.evicted)
            self._counts["evicted_own"] += placer.evicted_own
            placer.evicted.clear()
            placer.evicted_own = 0
        if found is None:
            self._counts["declined_over_share"] += placer.over_share
            return _FULL
        replica = self._index.reserve(item, parent, found.record, found.offset, node.writer)
        if placer.owner is not None:
            found.record.own(replica, placer.owner)
        node.reservations[replica.ref.id] = replica
        return replica
