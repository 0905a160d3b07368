"""What readers ask of the index: the longest complete prefix, leases on it, and that wrong replicas go.

Owns the read leases with their deadlines. Invariants: a lease's holder is a live node, or nobody; a lease ends with its
deadline, its holder, or when it is given back.
"""

from collections import Counter
from collections.abc import Iterable, Set

from kvcore.types import ChunkKey
from metadata_server.cache_messages import RenewReply, RenewRequest
from metadata_server.index.leases import Deadlines, Expiry, ReadLeases, bytes_of
from metadata_server.index.limits import IndexLimits
from metadata_server.index.nodes import LiveNode, NodeRegistry
from metadata_server.index.replicas import ReplicaIndex, segments_of
from metadata_server.index.segments import Replica
from metadata_server.messages import MatchReply, QuarantineRequest


class Reading:
    """Mutated by MetadataState only, which lets run out what is due before each call."""

    def __init__(
        self,
        nodes: NodeRegistry,
        index: ReplicaIndex,
        deadlines: Deadlines,
        counts: Counter[str],
        *,
        first_lease: int,
        limits: IndexLimits,
    ) -> None:
        """Ids of leases are above `first_lease`."""
        self.leases = ReadLeases(first_lease, max_given_back=limits.max_given_back)
        self._nodes = nodes
        self._index = index
        self._deadlines = deadlines
        self._counts = counts
        self._limits = limits

    def __repr__(self) -> str:
        return f"<Reading {len(self.leases)} leases>"

    def match(
        self,
        keys: list[ChunkKey],
        until: float | None,
        node_id: str,
        incarnation: int,
        *,
        in_order: bool = False,
        lease_name: int = 0,
    ) -> MatchReply:
        """See MetadataState.match; a lease is granted until `until`, None: no lease."""
        found: list[tuple[Replica, ...]] = []
        for key in keys:
            replicas = self._index.complete.get(key)
            if replicas is None:
                break
            found.append(replicas)
        flat = [replica for replicas in found for replica in replicas]
        if in_order:
            for record in {replica.record for replica in flat}:
                record.chains.link(keys[: len(found) + 1])  # the next one is what its asker will store
        for replica in reversed(flat):  # the first chunk is touched last: without it the others are of no use
            replica.record.touch(replica)
        self._counts["lookups"] += len(keys)
        self._counts["hits"] += len(found)
        lease_id = self._grant(flat, until, node_id, incarnation, lease_name) if until is not None and flat else 0
        refs = [[replica.ref for replica in replicas] for replicas in found]
        rest = keys[len(found) :]
        writers = self._index.writers(rest[0]) if rest else []
        num_writing = next((at for at, key in enumerate(rest) if key not in self._index.writing), len(rest))
        return MatchReply(
            replicas=refs,
            lease_id=lease_id,
            segments=segments_of(flat),
            writers=writers,
            num_writing=num_writing,
        )

    def release(self, lease_ids: Iterable[int], names: Iterable[int] = ()) -> None:
        """End leases; unknown ones have run out. What has one of the `names` ends too, or is never granted."""
        for lease_id in (*lease_ids, *(found for name in names if (found := self.leases.give_back(name)) is not None)):
            self.leases.end(lease_id)
            self._deadlines.drop((Expiry.READ_LEASE, lease_id))

    def renew(self, request: RenewRequest, now: float) -> RenewReply:
        """See MetadataState.renew."""
        node = self._nodes.get(request.node_id, request.incarnation)
        renewed = [node is not None and self.leases.is_held(number, node.info.id) for number in request.lease_ids]
        for number, held in zip(request.lease_ids, renewed, strict=True):
            if held:
                before = self._deadlines.at((Expiry.READ_LEASE, number)) or now
                self._deadlines.set((Expiry.READ_LEASE, number), max(before, now + request.lease_s))
        self._counts["leases_renewed"] += renewed.count(True)
        return RenewReply(renewed=renewed)

    def end_all_of(self, node: LiveNode) -> None:
        """End the leases that the node holds."""
        self.release(self.leases.of_holder(node.info.id))

    def quarantine(self, request: QuarantineRequest, now: float) -> None:
        """See MetadataState.quarantine. Room that others still read from rests until they have ended."""
        for item in request.items:
            bad = item.replica
            for replica in list(self._index.complete.get(bad.key, ())):
                if replica.ref.segment_id == bad.segment_id and replica.ref.generation == bad.generation:
                    self._index.retire(replica)
                    self.end_rest(replica, now)
                    self._counts[f"quarantined_{item.reason.value}"] += 1

    def end_rest(self, replica: Replica, now: float) -> None:
        """Room that rested is free, unless somebody still reads there: then it is looked at again."""
        if replica.pins:
            self._deadlines.set((Expiry.RETIRED, replica.ref.id), now + self._limits.forget_again_s)
        else:
            self._index.remove(replica)

    def check(self, pinned: Set[int]) -> None:
        """Assert every invariant. `pinned`: ids of the replicas that are kept for another reason, too. For tests."""
        pins = self.leases.pins()
        for number, replica in self._index.replicas.items():
            assert replica.pins == pins.get(number, 0) + (number in pinned)
        assert all(holder in self._nodes for holder in self.leases.holders())

    def _grant(self, replicas: list[Replica], until: float, node_id: str, incarnation: int, name: int) -> int:
        if name and not self.leases.wanted(name):
            self._counts["leases_given_back_unseen"] += 1
            return 0
        holder = self._nodes.get(node_id, incarnation)
        full = len(self.leases) >= self._limits.max_read_leases
        if full or (holder is None and not self._nobody_may_pin(bytes_of(replicas))):
            self._counts["leases_refused"] += 1
            return 0
        lease_id = self.leases.grant(replicas, holder.info.id if holder else None, name)
        self._deadlines.set((Expiry.READ_LEASE, lease_id), until)
        return lease_id

    def _nobody_may_pin(self, num_bytes: int) -> bool:
        room = sum(record.segment.size_bytes for record in self._nodes.segments.values())
        return self.leases.nobodys_bytes + num_bytes <= self._limits.nobodys_share * room
