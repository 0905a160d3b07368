"""What the metadata server knows, as a state machine without I/O: requests and `now` in, replies and events out.

The facade over nodes, reservations and reading: it lets time run, keeps the order between them, and drops what dies.
Invariants (`check_invariants`): what ran out by `now` is never served; what is reserved, leased or stored belongs to
live nodes. Events are in `log`; NODE_DOWN stands for the removal of all that lay in the node's segments.
"""

from collections import Counter
from collections.abc import Iterator

from kvcore.config.schema import StoreConfig
from kvcore.errors import NodeRefusedError
from kvcore.identity import ClusterIdentity
from kvcore.types import ChunkKey
from metadata_server.index.event_log import EventLog
from metadata_server.index.leases import Deadlines, Expiry
from metadata_server.index.limits import IndexLimits
from metadata_server.index.nodes import LiveNode, NodeRegistry
from metadata_server.index.reading import Reading
from metadata_server.index.replicas import ReplicaIndex
from metadata_server.index.reservations import Reservations
from metadata_server.index.segments import CallCount, SegmentRecord, acceptable
from metadata_server.index.tier_holdings import TierHoldings
from metadata_server.messages import (
    CommitReply,
    EventBatch,
    EventKind,
    FindHoldersReply,
    FindHoldersRequest,
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
    ReserveReply,
    ReserveRequest,
    SegmentManifest,
    Stats,
    TellHoldingsReply,
    TellHoldingsRequest,
)
from metadata_server.versions import SPOKEN, Protocols


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
        identity: ClusterIdentity = ClusterIdentity(),
        speaks: Protocols = SPOKEN,
        limits: IndexLimits = IndexLimits(),
    ) -> None:
        """`node_ttl_s` bounds what nodes may ask for; `first_generation` is above all that an earlier life gave out:
        generations, and ids of replicas and leases, so that what was granted in that life is unknown in this one.
        `identity` is what nodes must be of."""
        self.log = EventLog(epoch, event_log)
        self.speaks = speaks
        self.counters: Counter[str] = Counter(evicted=0)
        self._calls = CallCount()
        self._deadlines = deadlines = Deadlines()
        self._index = index = ReplicaIndex(self.log, first_generation)
        self._nodes = nodes = NodeRegistry(deadlines, node_ttl_s, identity, limits.max_replaced)
        self._holdings = TierHoldings(limits.max_tier_keys)
        self._reservations = Reservations(config, nodes, index, deadlines, self.counters)
        self._reading = Reading(nodes, index, deadlines, self.counters, first_lease=first_generation, limits=limits)
        self._nobodys_lease_s = limits.nobodys_lease_s

    def __repr__(self) -> str:
        held = f"{self.num_objects} objects, {self.num_reservations} reservations, {self.num_read_leases} read leases"
        return f"<MetadataState epoch {self.epoch}: {held}; {self._nodes}>"

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
        return len(self._reservations)

    @property
    def num_read_leases(self) -> int:
        """Held now."""
        return len(self._reading.leases)

    # --- time ----------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next, if nothing else happens."""
        return self._deadlines.next

    def tick(self, now: float) -> None:
        """Let run out what runs out by `now`. Every other method does so first, by itself."""
        self._calls.so_far += 1
        due = self._deadlines.next
        if due is None or due > now:
            return
        for expiry, what in self._deadlines.pop_due(now):
            if isinstance(what, str):
                self._drop_node(self._nodes[what], now)
                self.counters["nodes_expired"] += 1
            elif expiry is Expiry.READ_LEASE:
                self._reading.leases.end(what)
                self.counters["leases_expired"] += 1
            elif expiry is Expiry.RESERVATION:
                self._reservations.end(self._index.replicas[what], now)
                self.counters["expired"] += 1
            else:
                self._index.remove(self._index.replicas[what])
        self._index.publish()

    def renew_all_nodes(self, now: float) -> None:
        """The server stood still: every node's lease begins anew, as what they said meanwhile has not been read yet."""
        for node in self._nodes:
            self._nodes.renew(node, now)
        self.counters["stalls"] += 1

    # --- nodes ---------------------------------------------------------------------------------------------------

    def register(self, request: RegisterRequest, now: float) -> RegisterReply:
        """Join or join again. The request's segments are all that the node has: others of its segments are dropped.

        Raises NodeRefusedError for a node of another cluster or model, or whose id is another living process's;
        MetadataProtocolError for a segment that is another node's or has changed its size, or a node that has no
        version of the protocol in common with the server.
        """
        self.tick(now)
        info = request.node
        self.speaks.common(request.spoken, us="the metadata server", them=f"node {info.id}")
        try:
            node = self._nodes.check_request(request)
        except NodeRefusedError:
            self.counters["nodes_refused"] += 1
            raise
        # Nothing has changed so far; from here on nothing is refused. Who registers is one of four:
        # 1. a later start of a node that still counts as alive: the old one is dropped with all it held, then 2;
        # 2. a node that is not alive: it joins, and an event says so;
        # 3. a known incarnation with another address or fingerprint: only its info changes, and an event says so;
        # 4. a known incarnation as it was, which was told to register again or wants to be sure: nobody is told.
        replaces = node if node is not None and node.info.incarnation != info.incarnation else None
        if replaces is not None:
            self._drop_node(replaces, now)
        if node is None or node.info != info:
            node = self._nodes.join(info, replaces)
            self.log.append(EventKind.NODE_UP, info.id, node=info)
        self._nodes.renew(node, now, request.ttl_s)
        for absent in node.segments.keys() - {manifest.segment.id for manifest in request.segments}:
            self._drop_segment(node, absent, emit_event=True)
        imported = sum(self._adopt(node, manifest) for manifest in request.segments)
        refused = sum(len(manifest.entries) for manifest in request.segments) - imported
        self.counters["registrations"] += 1
        self.counters["imported"] += imported
        self.counters["import_refused"] += refused
        self._index.publish()
        return self.speaks.greet(RegisterReply(epoch=self.epoch, imported=imported, refused=refused))

    def heartbeat(self, request: HeartbeatRequest, now: float) -> HeartbeatReply:
        """Renew a lease; another incarnation than the registered one is not known."""
        self.tick(now)
        node = self._nodes.get(request.node_id, request.incarnation)
        if node is not None:
            self._nodes.renew(node, now)
        return HeartbeatReply(epoch=self.epoch, known=node is not None)

    def leave(self, request: LeaveRequest, now: float) -> None:
        """Drop the node with all that it holds. Another incarnation: nothing happens."""
        self.tick(now)
        node = self._nodes.get(request.node_id, request.incarnation)
        if node is not None:
            self._drop_node(node, now)
            self.counters["nodes_left"] += 1
            self._index.publish()

    def release_writer(self, request: ReleaseWriterRequest, now: float) -> None:
        """Give back what the node's dead engine had reserved and leased. Another incarnation: nothing happens."""
        self.tick(now)
        node = self._nodes.get(request.node_id, request.incarnation)
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
        """Longest complete prefix; makes it the last to be evicted. `lease_s` > 0 grants a new lease, renews none; one
        who is no live node gets less time, and none when such leases pin too much."""
        self.tick(now)
        if self._nodes.get(node_id, incarnation) is None:
            lease_s = min(lease_s, self._nobodys_lease_s)
        return self._reading.match(keys, now + lease_s if lease_s > 0 else None, node_id, incarnation)

    def release(self, lease_ids: list[int], now: float) -> None:
        """End read leases; unknown ones have run out."""
        self.tick(now)
        self._reading.release(lease_ids)

    def quarantine(self, request: QuarantineRequest, now: float) -> None:
        """Drop complete replicas of exactly that key, segment and generation (ids may be of an earlier epoch)."""
        self.tick(now)
        self._reading.quarantine(request)
        self._index.publish()

    # --- writers -------------------------------------------------------------------------------------------------

    def reserve(self, request: ReserveRequest, now: float) -> ReserveReply:
        """Room for chunks; evicts where it must. A writer that is not registered is told FULL: it does without."""
        self.tick(now)
        reply = self._reservations.reserve(request, now)
        self._index.publish()
        return reply

    def commit(self, request: ReplicaIds, now: float) -> CommitReply:
        """Make replicas visible, each by itself. True again for what this writer has committed and is still there."""
        self.tick(now)
        reply = self._reservations.commit(request)
        self._index.publish()
        return reply

    def abort(self, request: ReplicaIds, now: float) -> None:
        """Give reservations back. Their room rests for the grace time: a write that failed may still be landing."""
        self.tick(now)
        self._reservations.abort(request, now)

    # --- nodes' disks ----------------------------------------------------------------------------------------------

    def tell_holdings(self, request: TellHoldingsRequest, now: float) -> TellHoldingsReply:
        """Note what came to a node's disk and what left it. Another incarnation than the registered one: not known."""
        self.tick(now)
        if self._nodes.get(request.node_id, request.incarnation) is None:
            return TellHoldingsReply(known=False)
        if request.reset:
            self._holdings.drop(request.node_id)
        self._holdings.remove(request.node_id, request.removed)
        self._holdings.add(request.node_id, request.added)
        return TellHoldingsReply(known=True)

    def find_holders(self, request: FindHoldersRequest, now: float) -> FindHoldersReply:
        """Who has chunks on disk, up to the first that nobody has."""
        self.tick(now)
        holders = self._holdings.find(request.keys)
        names = sorted({name for having in holders for name in having})
        numbers = {name: number for number, name in enumerate(names)}
        nodes = [self._nodes[name].info for name in names]
        return FindHoldersReply(nodes=nodes, holders=[[numbers[name] for name in having] for having in holders])

    # --- what is seen from outside -------------------------------------------------------------------------------

    def nodes(self, now: float) -> NodesReply:
        """Live nodes and segments."""
        self.tick(now)
        segments = [record.segment for record in self._nodes.segments.values()]
        nodes, names = [node.info for node in self._nodes], self._nodes.identity
        return NodesReply(epoch=self.epoch, nodes=nodes, segments=segments, cluster=names.cluster, model=names.model)

    def stats(self, now: float, waiters: int) -> Stats:
        """What is held now. O(nodes + segments): the router asks each second."""
        self.tick(now)
        return Stats(
            epoch=self.epoch,
            nodes=[node.info for node in self._nodes],
            segments=[record.stats() for record in self._nodes.segments.values()],
            objects=self.num_objects,
            reservations=self.num_reservations,
            read_leases=self.num_read_leases,
            waiters=waiters,
            counters=dict(self.counters),
        )

    def snapshot(self, now: float) -> Iterator[EventBatch]:
        """The whole index as event batches; to be used up before the state changes."""
        self.tick(now)
        stored = [
            (record.segment.node_id, record.segment.id, [replica.ref.key for replica in record.complete_replicas()])
            for record in self._nodes.segments.values()
        ]
        return self.log.snapshot([node.info for node in self._nodes], stored)

    def check_invariants(self, now: float) -> None:
        """Assert that everything fits together, after a `tick` at `now`. O(n log n), for tests and simulations."""
        self.tick(now)
        for record in self._nodes.segments.values():
            record.check()
        self._index.check(self._nodes.segments.values())
        self._nodes.check()
        self._reservations.check()
        self._reading.check()
        assert self._deadlines.next is None or self._deadlines.next > now

    # --- inside --------------------------------------------------------------------------------------------------

    def _adopt(self, node: LiveNode, manifest: SegmentManifest) -> int:
        """Add a segment with what lies in it, or confirm what is known to lie there; returns how many entries count."""
        known = node.segments.get(manifest.segment.id)
        if known is not None:
            known.segment = manifest.segment
            refs = [replica.ref for replica in known.complete_replicas()]
            present = {(ref.key, ref.offset, ref.length, ref.generation) for ref in refs}
            return sum((e.key, e.offset, e.length, e.generation) in present for e in manifest.entries)
        entries = acceptable(manifest.segment, manifest.entries)
        record = SegmentRecord(manifest.segment, entries, self._calls)
        self._nodes.add_segment(node, record)
        for entry in reversed(entries):  # the newest generation will be the last to be evicted
            self._index.adopt(entry, record)
        return len(entries)

    def _give_back(self, node: LiveNode, now: float) -> None:
        self._reservations.end_all_of(node, now)
        self._reading.end_all_of(node)

    def _drop_segment(self, node: LiveNode, segment_id: str, *, emit_event: bool) -> None:
        record = self._nodes.remove_segment(node, segment_id)
        self._reservations.forget(record.replicas.values())
        self._index.forget(record.replicas.values(), emit_event=emit_event)
        record.clear()

    def _drop_node(self, node: LiveNode, now: float) -> None:
        # Its segments first: what it has reserved there needs no rest, what it has reserved elsewhere does.
        for segment_id in list(node.segments):
            self._drop_segment(node, segment_id, emit_event=False)
        self._give_back(node, now)
        self._nodes.remove(node)
        self._holdings.drop(node.info.id)
        self._index.publish()
        self.log.append(EventKind.NODE_DOWN, node.info.id)
