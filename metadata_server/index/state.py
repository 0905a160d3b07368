"""What the metadata server knows, as a state machine without I/O: requests and `now` in, replies and events out.

The facade over nodes, reservations and reading: it lets time run, keeps the order between them, and drops what dies.
Invariants (`check_invariants`): what ran out by `now` is never served; what is reserved, leased or stored belongs to
live nodes. Events are in `log`; NODE_DOWN stands for the removal of all that lay in the node's segments.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from kvcore.config.schema import StoreConfig
from kvcore.eviction.quotas import TenantShares
from kvcore.identity import ClusterIdentity
from kvcore.types import ChunkKey, OwnerTag
from metadata_server import cache_messages as c
from metadata_server import messages as m
from metadata_server.account_messages import ImportReply, ImportRequest, Stats
from metadata_server.index.cache_control import CacheControl
from metadata_server.index.chunks.calls import CallCount
from metadata_server.index.chunks.new_segments import NewSegments
from metadata_server.index.chunks.replicas import ReplicaIndex
from metadata_server.index.chunks.rows import ReplicaTable
from metadata_server.index.event_log import EventLog
from metadata_server.index.imports import Imports
from metadata_server.index.leases import Deadlines, Expiry, ExpiryOf
from metadata_server.index.limits import IndexLimits
from metadata_server.index.membership import ClusterMembership, IndexParts
from metadata_server.index.moving import ChunkMoves
from metadata_server.index.nodes import NodeRegistry
from metadata_server.index.orphans import IndexOrphans
from metadata_server.index.pins import Pins
from metadata_server.index.reading import Reading
from metadata_server.index.reservations import Reservations
from metadata_server.index.tier_holdings import TierHoldings
from metadata_server.partitions.joining import check_joins
from metadata_server.report import IndexReport
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
        shares: TenantShares | None = None,
    ) -> None:
        """`node_ttl_s` bounds what nodes may ask for; `first_generation` is above all that an earlier life gave out:
        generations, and ids of replicas and leases, so that what was granted in that life is unknown in this one.
        `identity` is what nodes must be of. `shares`: of tenants; if not given, the configuration's."""
        self.log, self.speaks = EventLog(epoch, event_log), speaks
        self.counters: Counter[str] = Counter(evicted=0)
        self._calls = CallCount(same_use_s=limits.same_use_s)
        self._deadlines = deadlines = Deadlines()
        table = ReplicaTable()
        self._pins = Pins(limits.max_pins, self.counters, table)
        first, step = speaks.numbering(first_generation)
        self._index = index = ReplicaIndex(self.log, first, self._pins, table, limits, step=step)
        self._nodes = nodes = NodeRegistry(deadlines, node_ttl_s, identity, limits)
        self.orders, self._holdings = nodes.orders, TierHoldings(limits)
        self._reservations = Reservations(config, nodes, index, deadlines, self.counters, first_grant=first, step=step)
        self.moves = ChunkMoves(nodes, index, self._reservations, self.tick, limits)
        self._reading = Reading(nodes, index, deadlines, self.counters, first_lease=first, step=step, limits=limits)
        self._cache = CacheControl(
            nodes, index, config=config, pins=self._pins, deadlines=deadlines, counts=self.counters, limits=limits
        )
        self._imports = Imports(nodes, index, self._cache, self.counters, first_generation)
        parts = IndexParts(
            nodes, index, self._reservations, self._reading, self._cache, self._pins, self._imports, self._holdings
        )
        new_record = NewSegments(config, limits, table, self._calls, shares).record
        self._membership = ClusterMembership(parts, log=self.log, new_record=new_record, counts=self.counters)
        self.orphans = IndexOrphans(parts, self._membership)
        self.report = IndexReport(parts, self.log, counts=self.counters)
        self._limits, self._node_ttl_s = limits, node_ttl_s
        self._settled_at = -math.inf  # from then on every node that lives has been heard

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

    def oldest_reservation_s(self, now: float) -> float:
        """Since when the oldest has been open; 0: none is."""
        return self._reservations.oldest_s(now)

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
        self._calls.now = now
        if (due := self._deadlines.next) is None or due > now:
            return
        for expiry, what in self._deadlines.pop_due(now):
            self._run_out(expiry, what, now)
        self._index.publish()

    def sweep(self) -> bool:
        """Forget some of what gone nodes held, which nobody finds; milliseconds' work. Whether there is more."""
        return self._index.gone.sweep() or self._holdings.sweep()

    def renew_all_nodes(self, now: float) -> None:
        """The server stood still: every node's lease begins anew, as what they said meanwhile has not been read yet."""
        self._nodes.renew_all(now)
        self.counters["stalls"] += 1

    def began(self, now: float) -> None:
        """This life of the server begins: its nodes are still to be heard."""
        self._settled_at = now + self._node_ttl_s

    def why_unknown(self, now: float) -> str:
        """Why nodes may have what is not known here yet; empty: they have not."""
        if now < self._settled_at:
            return "the metadata server has begun a moment ago, and nodes are still to be heard"
        return f"{len(self._imports)} segments have not told yet what lies in them" if self._imports else ""

    # --- nodes ---------------------------------------------------------------------------------------------------

    def register(self, request: m.RegisterRequest, now: float) -> m.RegisterReply:
        """Join or join again. The request's segments are all that the node has: others of its segments are dropped.

        Raises NodeRefusedError for a node of another cluster or model, or whose id is another living process's;
        MetadataProtocolError for a segment that is another node's or has changed its size, or a node that has no
        version of the protocol in common with the server.
        """
        self.tick(now)
        check_joins(self.speaks, request)
        return self.speaks.greet(self._membership.register(request, now))

    def import_piece(self, request: ImportRequest, now: float) -> ImportReply:
        """See ImportRequest."""
        self.tick(now)
        return self._imports.take(request, now)

    def heartbeat(self, request: m.HeartbeatRequest, now: float) -> m.HeartbeatReply:
        """Renew a lease; another incarnation than the registered one is not known."""
        self.tick(now)
        if (node := self._nodes.get(request.node_id, request.incarnation)) is not None:
            self._nodes.renew(node, now)
        drained, sheds = self.orders.drain_of(request.node_id), self.moves.rebalance.wants(node, now)
        known, role = node is not None, self.orders.role_of(request.node_id)
        reply = m.HeartbeatReply(epoch=self.epoch, known=known, drained=drained, sheds=sheds, role=role)
        return self.speaks.greet(reply)

    def leave(self, request: m.LeaveRequest, now: float) -> None:
        """Drop the node with all that it holds. Another incarnation: nothing happens."""
        self.tick(now)
        node = self._nodes.get(request.node_id, request.incarnation)
        if node is not None:
            self._membership.drop(node, now)
            self.counters["nodes_left"] += 1
            self._index.publish()

    def release_writer(self, request: c.ReleaseWriterRequest, now: float) -> None:
        """Give back what the node's dead or hung engine reserved and leased. Another incarnation: nothing happens."""
        self.tick(now)
        node = self._nodes.get(request.node_id, request.incarnation)
        if node is not None:
            self._membership.give_back(node, now, writes_on=request.hangs is True)
            self.counters["writers_released"] += 1

    # --- readers -------------------------------------------------------------------------------------------------

    def complete_prefix(self, keys: list[ChunkKey], now: float) -> int:
        """How many leading keys are complete. Touches nothing but what ran out."""
        self.tick(now)
        return len(self._index.prefix(keys))

    def match(
        self,
        keys: list[ChunkKey],
        now: float,
        *,
        lease_s: float = 0.0,
        node_id: str = "",
        incarnation: int = 0,
        in_order: bool = False,
        lease_name: int = 0,
        owner: OwnerTag | None = None,
    ) -> m.MatchReply:
        """Longest complete prefix, which is used now. `lease_s` > 0: a new lease; for no node a shorter one, if any."""
        self.tick(now)
        is_live, limits = self._nodes.get(node_id, incarnation) is not None, self._limits
        lease_s = min(lease_s, limits.longest_lease_s if is_live else limits.nobodys_lease_s)
        reply = self._reading.match(
            keys, now, lease_s, (node_id, incarnation), in_order=in_order, lease_name=lease_name, owner=owner
        )
        return msgspec.structs.replace(reply, rebuilding=True) if self.why_unknown(now) else reply

    def release(self, lease_ids: list[int], now: float, names: Iterable[int] = ()) -> None:
        """End read leases, and what was reserved by these names; unknown ones ran out, names not seen yet get none."""
        self.tick(now)
        self._reading.release(lease_ids, self._reservations.give_back(names, now))

    def renew(self, request: c.RenewRequest, now: float) -> c.RenewReply:
        """See RenewRequest. Nothing else renews a lease, and nothing shortens one."""
        self.tick(now)
        return self._reading.renew(request, now)

    def quarantine(self, request: m.QuarantineRequest, now: float) -> None:
        """Drop complete replicas of exactly that key, segment and generation (ids may be of an earlier epoch)."""
        self.tick(now)
        self._reading.quarantine(request, now)
        self._index.publish()

    # --- writers -------------------------------------------------------------------------------------------------

    def reserve(self, request: m.ReserveRequest, now: float) -> m.ReserveReply:
        """Room for chunks; evicts where it must. A writer that is not registered is told FULL: it does without."""
        self.tick(now)
        reply = self._reservations.reserve(request, now, wanted=self._reading.leases.wanted(request.write_name or 0))
        self._index.publish()
        return reply

    def commit(self, request: m.ReplicaIds, now: float) -> m.CommitReply:
        """Make replicas visible, each by itself. True again for what this writer has committed and is still there."""
        self.tick(now)
        reply = self._reservations.commit(request)
        ids = zip(request.replica_ids, reply.committed, strict=True)
        self._cache.stored((self._index.key_of(number) for number, done in ids if done), now)
        self._index.publish()
        return reply

    def abort(self, request: m.ReplicaIds, now: float) -> None:
        """Give reservations back. Their room rests for the grace time: a write that failed may still be landing."""
        self.tick(now)
        self._reservations.abort(request, now)

    # --- nodes' disks, and what people want kept ------------------------------------------------------------------

    def tell_holdings(self, request: m.TellHoldingsRequest, now: float) -> m.TellHoldingsReply:
        """Note what came to a node's disk and what left it. Another incarnation than the registered one: not known."""
        self.tick(now)
        if self._nodes.get(request.node_id, request.incarnation) is None:
            return m.TellHoldingsReply(known=False)
        self._holdings.note(request, self.log)
        return m.TellHoldingsReply(known=True)

    def find_holders(self, request: m.FindHoldersRequest, now: float) -> m.FindHoldersReply:
        """Who has chunks on disk, up to the first that nobody has."""
        self.tick(now)
        return self._holdings.reply(request.keys, self._nodes)

    def pin(self, request: c.PinRequest, now: float) -> c.CacheReply:
        """See PinRequest."""
        self.tick(now)
        return self._cache.pin(request, now)

    def unpin(self, request: c.UnpinRequest, now: float) -> c.CacheReply:
        """See UnpinRequest."""
        self.tick(now)
        return self._cache.unpin(request, now)

    def evict(self, request: c.EvictRequest, now: float) -> c.CacheReply:
        """See EvictRequest."""
        self.tick(now)
        return self._cache.evict(request)

    def expire(self, request: c.ExpireRequest, now: float) -> c.CacheReply:
        """See ExpireRequest."""
        self.tick(now)
        return self._cache.expire(request, now)

    def pins(self, _: object, now: float) -> c.PinsReply:
        """What is pinned."""
        self.tick(now)
        return self._cache.listed(now)

    # --- what is seen from outside -------------------------------------------------------------------------------

    def nodes(self, now: float) -> m.NodesReply:
        """Live nodes and segments."""
        self.tick(now)
        return self.report.nodes()

    def stats(self, now: float, waiters: int) -> Stats:
        """What is held now. O(nodes + segments): the router asks each second."""
        self.tick(now)
        return self.report.stats(waiters)

    def snapshot(self, now: float) -> Iterator[m.EventBatch]:
        """The whole index as event batches; see IndexReport."""
        self.tick(now)
        return self.report.snapshot()

    def check_invariants(self, now: float) -> None:
        """Assert that everything fits together, after a `tick` at `now`. O(n log n), for tests and simulations."""
        self.tick(now)
        for record in self._nodes.segments.values():
            record.check()
        self._index.check()
        self._nodes.check()
        self._reservations.check()
        self._reading.check(self._pins.held)
        self._cache.check()
        self._imports.check()
        assert self._deadlines.next is None or self._deadlines.next > now

    # --- inside --------------------------------------------------------------------------------------------------

    def _run_out(self, expiry: Expiry, what: ExpiryOf, now: float) -> None:
        if isinstance(what, str):
            self._membership.drop(self._nodes[what], now)
            self.counters["nodes_expired"] += 1
        elif isinstance(what, bytes):
            (self._cache.end_pin if expiry is Expiry.PIN else self._cache.end_chunk)(what, now)
        elif expiry is Expiry.READ_LEASE:
            self._reading.leases.end(what)
            self.counters["leases_expired"] += 1
        elif expiry is Expiry.RESERVATION:
            self._reservations.run_out(what, now)
        else:
            self._reading.end_rest(what, now)
