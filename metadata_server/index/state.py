"""What the metadata server knows, as a state machine without I/O: requests and `now` in, replies and events out.

Owns the life of nodes, reservations and leases over a ReplicaIndex. Invariants (`check_invariants`): reservations,
leases with a holder and segments belong to live nodes; what ran out by `now` is never served. Events are in `log`;
NODE_DOWN stands for the removal of all that lay in the node's segments.
"""

from collections import Counter
from collections.abc import Iterator

from kvcore.config.schema import StoreConfig
from kvcore.errors import MetadataProtocolError
from kvcore.types import ChunkKey, NodeInfo
from metadata_server.index.event_log import EventLog
from metadata_server.index.leases import Deadlines, ReadLeases, Timer
from metadata_server.index.placement import place
from metadata_server.index.replicas import ReplicaIndex, homes, without
from metadata_server.index.segments import Replica, ReplicaState, SegmentRecord, Writer, acceptable
from metadata_server.messages import (
    CommitReply,
    EventBatch,
    EventKind,
    HeartbeatReply,
    HeartbeatRequest,
    LeaveRequest,
    MatchReply,
    NodesReply,
    QuarantineRequest,
    RegisterReply,
    RegisterRequest,
    ReleaseWriterRequest,
    ReplicaIds,
    ReserveItem,
    ReserveOutcome,
    ReserveReply,
    ReserveRequest,
    ReserveStatus,
    SegmentManifest,
    Stats,
)
from metadata_server.versions import SPOKEN, Protocols

MAX_READ_LEASES = 65_536
_TOMBSTONE_TTLS = 12
_BUSY = ReserveOutcome(status=ReserveStatus.BUSY)
_EXISTS = ReserveOutcome(status=ReserveStatus.EXISTS)
_FULL = ReserveOutcome(status=ReserveStatus.FULL)


class _Node:
    """A live node."""

    def __init__(self, info: NodeInfo) -> None:
        self.info = info
        self.ttl_s = 0.0
        self.segments: dict[str, SegmentRecord] = {}
        self.reservations: dict[int, Replica] = {}


class MetadataState:
    """The whole of it. Not thread-safe; every method leaves it consistent, also when it raises."""

    def __init__(
        self,
        config: StoreConfig,
        node_ttl_s: float,
        epoch: str,
        first_generation: int,
        *,
        event_log: int = 65_536,
        speaks: Protocols = SPOKEN,
    ) -> None:
        """`node_ttl_s` bounds what nodes may ask for; `first_generation` is above all that an earlier life gave out:
        generations, and ids of replicas and leases, so that what was granted in that life is unknown in this one."""
        self.log = EventLog(epoch, event_log)
        self.speaks = speaks
        self.counters: Counter[str] = Counter()
        self._config = config
        self._node_ttl_s = node_ttl_s
        self._nodes: dict[str, _Node] = {}
        self._gone: dict[str, tuple[int, float]] = {}  # node -> (last incarnation, when to forget it)
        self._segments: dict[str, SegmentRecord] = {}
        self._index = ReplicaIndex(self.log, first_generation)
        self._leases = ReadLeases(first_generation)
        self._deadlines = Deadlines()

    @property
    def epoch(self) -> str:
        """Names this life of the server."""
        return self.log.epoch

    @property
    def num_objects(self) -> int:
        """Keys with a complete replica."""
        return len(self._index.complete)

    @property
    def num_reservations(self) -> int:
        """Neither committed nor given back."""
        return sum(len(node.reservations) for node in self._nodes.values())

    @property
    def num_read_leases(self) -> int:
        """Held now."""
        return len(self._leases)

    # --- time ----------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next, if nothing else happens."""
        return self._deadlines.next

    def tick(self, now: float) -> None:
        """Let run out what runs out by `now`. Every other method does so first, by itself."""
        for timer, what in self._deadlines.pop_due(now):
            if isinstance(what, str):
                self._drop_node(self._nodes[what], now)
                self.counters["nodes_expired"] += 1
            elif timer is Timer.READ_LEASE:
                self._leases.end(what)
                self.counters["leases_expired"] += 1
            elif timer is Timer.RESERVATION:
                self._retire(self._index.replicas[what], now)
                self.counters["expired"] += 1
            else:
                self._index.remove(self._index.replicas[what])
        self._index.publish()

    def spare_nodes(self, now: float) -> None:
        """The server stood still: every node's lease begins anew, as what they said meanwhile has not been read yet."""
        for name, node in self._nodes.items():
            self._deadlines.set((Timer.NODE, name), now + node.ttl_s)
        self.counters["stalls"] += 1

    # --- nodes ---------------------------------------------------------------------------------------------------

    def register(self, request: RegisterRequest, now: float) -> RegisterReply:
        """Join or join again. The request's segments are all that the node has: others of its segments are dropped.

        Raises MetadataProtocolError for an incarnation older than the last one seen, a segment that is another node's
        or has changed its size, or a node that has no version of the protocol in common with the server.
        """
        self.tick(now)
        info = request.node
        self.speaks.common(request.spoken, us="the metadata server", them=f"node {info.id}")
        node = self._nodes.get(info.id)
        self._check_incarnation(info, node)
        self._check_segments(info, request.segments)
        if node is not None and info.incarnation > node.info.incarnation:
            self._drop_node(node, now)
            node = None
        if node is None or node.info != info:
            node = self._nodes.setdefault(info.id, _Node(info))
            node.info = info
            self._gone.pop(info.id, None)
            self.log.append(EventKind.NODE_UP, info.id, node=info)
        node.ttl_s = min(request.ttl_s, self._node_ttl_s)
        self._deadlines.set((Timer.NODE, info.id), now + node.ttl_s)
        for absent in node.segments.keys() - {manifest.segment.id for manifest in request.segments}:
            self._drop_segment(node, absent, say=True)
        imported = sum(self._take_in(node, manifest) for manifest in request.segments)
        refused = sum(len(manifest.entries) for manifest in request.segments) - imported
        self.counters["registrations"] += 1
        self.counters["imported"] += imported
        self.counters["import_refused"] += refused
        self._index.publish()
        return self.speaks.greet(RegisterReply(epoch=self.epoch, imported=imported, refused=refused))

    def heartbeat(self, request: HeartbeatRequest, now: float) -> HeartbeatReply:
        """Renew a lease; another incarnation than the registered one is not known."""
        self.tick(now)
        node = self._live(request.node_id, request.incarnation)
        if node is not None:
            self._deadlines.set((Timer.NODE, node.info.id), now + node.ttl_s)
        return HeartbeatReply(epoch=self.epoch, known=node is not None)

    def leave(self, request: LeaveRequest, now: float) -> None:
        """Drop the node with all that it holds. Another incarnation: nothing happens."""
        self.tick(now)
        node = self._live(request.node_id, request.incarnation)
        if node is not None:
            self._drop_node(node, now)
            self.counters["nodes_left"] += 1
            self._index.publish()

    def release_writer(self, request: ReleaseWriterRequest, now: float) -> None:
        """Give back what the node's dead engine had reserved and leased. Another incarnation: nothing happens."""
        self.tick(now)
        node = self._live(request.node_id, request.incarnation)
        if node is not None:
            self._give_back(node, now)
            self.counters["writers_released"] += 1

    # --- readers -------------------------------------------------------------------------------------------------

    def complete_prefix(self, keys: list[ChunkKey], now: float) -> int:
        """How many leading keys are complete. Touches nothing but what ran out."""
        self.tick(now)
        return next((at for at, key in enumerate(keys) if key not in self._index.complete), len(keys))

    def match(
        self, keys: list[ChunkKey], now: float, *, lease_s: float = 0.0, node_id: str = "", incarnation: int = 0
    ) -> MatchReply:
        """Longest complete prefix; makes it the last to be evicted. `lease_s` > 0 grants a new lease, renews none."""
        self.tick(now)
        found: list[list[Replica]] = []
        for key in keys:
            replicas = self._index.complete.get(key)
            if replicas is None:
                break
            found.append(replicas)
        flat = [replica for replicas in found for replica in replicas]
        for replica in reversed(flat):  # the first chunk is touched last: without it the others are of no use
            replica.home.touch(replica)
        self.counters["lookups"] += len(keys)
        self.counters["hits"] += len(found)
        lease_id = self._grant(flat, now + lease_s, node_id, incarnation) if lease_s > 0 and flat else 0
        refs = [[replica.ref for replica in replicas] for replicas in found]
        return MatchReply(replicas=refs, lease_id=lease_id, segments=homes(flat))

    def release(self, lease_ids: list[int], now: float) -> None:
        """End read leases; unknown ones have run out."""
        self.tick(now)
        for lease_id in lease_ids:
            self._leases.end(lease_id)
            self._deadlines.drop((Timer.READ_LEASE, lease_id))

    def quarantine(self, request: QuarantineRequest, now: float) -> None:
        """Drop complete replicas of exactly that key, segment and generation (ids may be of an earlier epoch)."""
        self.tick(now)
        for item in request.items:
            bad = item.replica
            for replica in list(self._index.complete.get(bad.key, ())):
                if replica.ref.segment_id == bad.segment_id and replica.ref.generation == bad.generation:
                    self._index.remove(replica)
                    self.counters[f"quarantined_{item.reason.value}"] += 1
        self._index.publish()

    # --- writers -------------------------------------------------------------------------------------------------

    def reserve(self, request: ReserveRequest, now: float) -> ReserveReply:
        """Room for chunks; evicts where it must. A writer that is not registered is told FULL: it does without."""
        self.tick(now)
        node = self._live(request.node_id, request.incarnation)
        if node is None:
            self.counters["declined_unknown_writer"] += len(request.items)
            return ReserveReply(outcomes=[_FULL] * len(request.items))
        prefer = self._segments.get(request.prefer_segment or "")
        expires_at = now + request.ttl_s
        for item in reversed(request.items):  # before any eviction: room for a prefix's tail is not to cost its head
            for replica in self._index.complete.get(item.key, ()):
                replica.home.touch(replica)
        outcomes, granted = [], []
        for item in request.items:
            result = self._reserve_one(item, node, prefer)
            if isinstance(result, Replica):
                self._deadlines.set((Timer.RESERVATION, result.ref.id), expires_at)
                granted.append(result)
                outcomes.append(ReserveOutcome(status=ReserveStatus.GRANTED, replica=result.ref))
                self.counters["reserved"] += 1
            else:
                outcomes.append(result)
                self.counters[f"declined_{result.status.value}"] += 1
        self._index.publish()
        return ReserveReply(outcomes=outcomes, segments=homes(granted))

    def commit(self, request: ReplicaIds, now: float) -> CommitReply:
        """Make replicas visible, each by itself. True again for what this writer has committed and is still there."""
        self.tick(now)
        node = self._live(request.node_id, request.incarnation)
        writer = Writer(request.node_id, request.incarnation)
        committed, fresh = [], dict[int, Replica]()
        for number in request.replica_ids:
            replica = self._index.replicas.get(number)
            ours = node is not None and replica is not None and replica.writer == writer
            if node and replica and ours and node.reservations.pop(number, None):
                self._deadlines.drop((Timer.RESERVATION, number))
                fresh[number] = replica
            committed.append(
                ours and replica is not None and (number in fresh or replica.state is ReplicaState.COMPLETE)
            )
        self._index.commit(list(fresh.values()))
        self.counters["committed"] += len(fresh)
        self.counters["commit_refused"] += committed.count(False)
        self._index.publish()
        return CommitReply(committed=committed)

    def abort(self, request: ReplicaIds, now: float) -> None:
        """Give reservations back. Their room rests for the grace time: a write that failed may still be landing."""
        self.tick(now)
        node = self._live(request.node_id, request.incarnation)
        for number in request.replica_ids if node else ():
            replica = node.reservations.get(number) if node else None
            if replica is not None:
                self._retire(replica, now)
                self.counters["aborted"] += 1

    # --- what is seen from outside -------------------------------------------------------------------------------

    def nodes(self, now: float) -> NodesReply:
        """Live nodes and segments."""
        self.tick(now)
        segments = [record.segment for record in self._segments.values()]
        return NodesReply(epoch=self.epoch, nodes=[node.info for node in self._nodes.values()], segments=segments)

    def stats(self, now: float, waiters: int) -> Stats:
        """What is held now. O(nodes + segments): the router asks each second."""
        self.tick(now)
        return Stats(
            epoch=self.epoch,
            nodes=[node.info for node in self._nodes.values()],
            segments=[record.stats() for record in self._segments.values()],
            objects=self.num_objects,
            reservations=self.num_reservations,
            read_leases=self.num_read_leases,
            waiters=waiters,
            counters=dict(self.counters),
        )

    def snapshot(self, now: float) -> Iterator[EventBatch]:
        """The whole index as event batches; to be used up before the state changes."""
        self.tick(now)
        stored = [(r.segment.node_id, r.segment.id, [x.ref.key for x in r.lying()]) for r in self._segments.values()]
        return self.log.snapshot([node.info for node in self._nodes.values()], stored)

    def check_invariants(self, now: float) -> None:
        """Assert that everything fits together, after a `tick` at `now`. O(n log n), for tests and simulations."""
        self.tick(now)
        for record in self._segments.values():
            record.check()
        self._index.check(self._segments.values())
        assert self._segments == {n: r for node in self._nodes.values() for n, r in node.segments.items()}
        reserved = {n: r for node in self._nodes.values() for n, r in node.reservations.items()}
        pins = self._leases.pins()
        for number, replica in self._index.replicas.items():
            assert (replica.state is ReplicaState.RESERVED) == (number in reserved)
            assert ((Timer.RESERVATION, number) in self._deadlines) == (replica.state is ReplicaState.RESERVED)
            assert ((Timer.RETIRED, number) in self._deadlines) == (replica.state is ReplicaState.RETIRING)
            assert replica.pins == pins.get(number, 0)
        for number, replica in reserved.items():
            assert self._index.replicas[number] is replica and replica.writer is not None
            assert self._live(replica.writer.node_id, replica.writer.incarnation), "a reservation without its writer"
        assert self._leases.holders() <= self._nodes.keys()
        assert all((Timer.NODE, name) in self._deadlines for name in self._nodes)
        assert self._deadlines.next is None or self._deadlines.next > now

    # --- inside --------------------------------------------------------------------------------------------------

    def _live(self, node_id: str, incarnation: int) -> _Node | None:
        node = self._nodes.get(node_id)
        return node if node is not None and node.info.incarnation == incarnation else None

    def _check_incarnation(self, info: NodeInfo, node: _Node | None) -> None:
        last = node.info.incarnation if node else self._gone.get(info.id, (0, 0.0))[0]
        if info.incarnation < last:
            raise MetadataProtocolError(
                f"node {info.id} registers with incarnation {info.incarnation}, but {last} has been seen",
                param="node.incarnation",
            )

    def _check_segments(self, info: NodeInfo, manifests: list[SegmentManifest]) -> None:
        seen: set[str] = set()
        for at, manifest in enumerate(manifests):
            segment, known = manifest.segment, self._segments.get(manifest.segment.id)
            problem = None
            if segment.node_id != info.id or (known is not None and known.segment.node_id != info.id):
                problem = "belongs to another node"
            elif segment.id in seen:
                problem = "is listed twice"
            elif known is not None and known.segment.size_bytes != segment.size_bytes:
                problem = f"was {known.segment.size_bytes} bytes long and cannot change"
            if problem:
                raise MetadataProtocolError(f"segment {segment.id} {problem}", param=f"segments[{at}].segment")
            seen.add(segment.id)

    def _take_in(self, node: _Node, manifest: SegmentManifest) -> int:
        """Add a segment with what lies in it, or confirm what is known to lie there; returns how many entries count."""
        known = node.segments.get(manifest.segment.id)
        if known is not None:
            known.segment = manifest.segment
            present = {(r.ref.key, r.ref.offset, r.ref.length, r.ref.generation) for r in known.lying()}
            return sum((e.key, e.offset, e.length, e.generation) in present for e in manifest.entries)
        entries = acceptable(manifest.segment, manifest.entries)
        record = SegmentRecord(manifest.segment, entries)
        node.segments[record.segment.id] = self._segments[record.segment.id] = record
        for entry in reversed(entries):  # the newest generation will be the last to be evicted
            self._index.take_in(entry, record)
        return len(entries)

    def _reserve_one(self, item: ReserveItem, node: _Node, prefer: SegmentRecord | None) -> Replica | ReserveOutcome:
        if item.key in self._index.complete:
            return _EXISTS
        writing = self._index.writing.get(item.key, [])
        allowed = list(without(self._segments.values(), writing))
        if len(writing) >= self._config.max_replicas or (writing and not allowed):
            return _BUSY
        found, evicted = place(item.length, self._config, prefer=prefer, own=node.segments.values(), allowed=allowed)
        self._index.forget(evicted)
        self.counters["evicted"] += len(evicted)
        if found is None:
            return _FULL
        writer = Writer(node.info.id, node.info.incarnation)
        replica = self._index.reserve(item.key, item.length, found.home, found.offset, writer)
        node.reservations[replica.ref.id] = replica
        return replica

    def _grant(self, replicas: list[Replica], until: float, node_id: str, incarnation: int) -> int:
        if len(self._leases) >= MAX_READ_LEASES:
            self.counters["leases_refused"] += 1
            return 0
        holder = self._live(node_id, incarnation)
        lease_id = self._leases.grant(replicas, holder.info.id if holder else None)
        self._deadlines.set((Timer.READ_LEASE, lease_id), until)
        return lease_id

    def _retire(self, replica: Replica, now: float) -> None:
        number = replica.ref.id
        if replica.writer is not None:
            self._nodes[replica.writer.node_id].reservations.pop(number)
        self._deadlines.drop((Timer.RESERVATION, number))
        self._deadlines.set((Timer.RETIRED, number), now + self._config.retire_grace_s)
        self._index.retire(replica)

    def _give_back(self, node: _Node, now: float) -> None:
        """End what the node has reserved and leased."""
        for replica in list(node.reservations.values()):
            self._retire(replica, now)
        for lease_id in self._leases.of_holder(node.info.id):
            self._leases.end(lease_id)
            self._deadlines.drop((Timer.READ_LEASE, lease_id))

    def _drop_segment(self, node: _Node, segment_id: str, *, say: bool) -> None:
        record = node.segments.pop(segment_id)
        del self._segments[segment_id]
        for number, replica in record.replicas.items():
            self._deadlines.drop((Timer.RESERVATION, number))
            self._deadlines.drop((Timer.RETIRED, number))
            if replica.state is ReplicaState.RESERVED and replica.writer is not None:
                self._nodes[replica.writer.node_id].reservations.pop(number)
        self._index.forget(record.replicas.values(), say=say)
        record.replicas = {}
        record.lru = {}

    def _drop_node(self, node: _Node, now: float) -> None:
        name = node.info.id
        for segment_id in list(node.segments):
            self._drop_segment(node, segment_id, say=False)
        self._give_back(node, now)
        self._deadlines.drop((Timer.NODE, name))
        del self._nodes[name]
        self._gone = {other: (last, until) for other, (last, until) in self._gone.items() if until > now}
        self._gone[name] = (node.info.incarnation, now + _TOMBSTONE_TTLS * self._node_ttl_s)
        self._index.publish()
        self.log.append(EventKind.NODE_DOWN, name)
