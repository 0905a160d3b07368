"""What readers ask of the index: the longest complete prefix, leases on it, and that wrong replicas go.

Owns the read leases with their deadlines. Invariants: a lease's holder is a live node, or nobody; a lease ends with its
deadline, its holder, or when it is given back.
"""

from collections import Counter
from collections.abc import Iterable, Set

from kvcore.types import ChunkKey, OwnerTag, ReplicaRef
from metadata_server.cache_messages import RenewReply, RenewRequest
from metadata_server.index.chunks.replicas import ReplicaIndex
from metadata_server.index.leases import Deadlines, Expiry, ReadLeases
from metadata_server.index.limits import IndexLimits
from metadata_server.index.nodes import LiveNode, NodeRegistry
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
        step: int = 1,
        limits: IndexLimits,
    ) -> None:
        """Ids of leases are above `first_lease`, each by `step` above the one before."""
        self.leases = ReadLeases(index, first_lease, step=step, max_given_back=limits.max_given_back)
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
        now: float,
        lease_s: float,
        reader: tuple[str, int],
        *,
        in_order: bool = False,
        lease_name: int = 0,
        owner: OwnerTag | None = None,
    ) -> MatchReply:
        """See MetadataState.match. `reader`: which start of which node."""
        index = self._index
        found = flat = index.prefix(keys)
        copied = index.copies and not index.copies.keys().isdisjoint(keys[: len(found)])
        if copied:
            flat = [row for key in keys[: len(found)] for row in index.rows(key)]
        if in_order:
            index.link(keys, found)
        index.use(flat[::-1])  # the first chunk is used last: without it the others are of no use
        self._counts["lookups"] += len(keys)
        self._counts["hits"] += len(found)
        lease_id = 0
        if lease_s > 0 and flat:
            lease_id = self._grant(flat, now, lease_s, reader, name=lease_name, owner=owner)
        refs = index.refs(flat)
        rest = keys[len(found) :]
        writers = index.writers(rest[0]) if rest else []
        num_writing = next((at for at, key in enumerate(rest) if key not in index.writing), len(rest))
        by_key = {key: list[ReplicaRef]() for key in keys[: len(found)]} if copied else {}
        for ref in dict.fromkeys(refs) if copied else ():
            by_key[ref.key].append(ref)
        return MatchReply(
            replicas=[by_key[key] for key in keys[: len(found)]] if copied else [[ref] for ref in refs],
            lease_id=lease_id,
            segments=index.segments_of(flat),
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
                until = now + min(request.lease_s, self._limits.longest_lease_s)
                self._deadlines.set((Expiry.READ_LEASE, number), max(before, until))
        self._counts["leases_renewed"] += renewed.count(True)
        return RenewReply(renewed=renewed)

    def end_all_of(self, node: LiveNode) -> None:
        """End the leases that the node holds."""
        self.release(self.leases.of_holder(node.info.id))

    def quarantine(self, request: QuarantineRequest, now: float) -> None:
        """See MetadataState.quarantine. Room that others still read from rests until they have ended."""
        for item in request.items:
            bad = item.replica
            for row in self._index.rows(bad.key):
                known = self._index.table.generations[row] == bad.generation
                if known and self._index.record(row).segment.id == bad.segment_id:
                    self._index.retire(row)
                    self.end_rest(row, now)
                    self._counts[f"quarantined_{item.reason.value}"] += 1

    def end_rest(self, row: int, now: float) -> None:
        """Room that rested is free, unless somebody still reads there: then it is looked at again."""
        if row in self._index.table.pins:
            self._deadlines.set((Expiry.RETIRED, row), now + self._limits.forget_again_s)
        else:
            self._index.remove(row)

    def check(self, pinned: Set[int]) -> None:
        """Assert every invariant. `pinned`: rows that are kept for another reason, too. For tests."""
        self.leases.check()
        pins = Counter(self.leases.pins())
        pins.update(pinned)
        assert pins == self._index.table.pins
        assert all(holder in self._nodes for holder in self.leases.holders())

    def _grant(
        self,
        rows: list[int],
        now: float,
        lease_s: float,
        reader: tuple[str, int],
        *,
        name: int,
        owner: OwnerTag | None,
    ) -> int:
        if name and not self.leases.wanted(name):
            self._counts["leases_given_back_unseen"] += 1
            return 0
        holder = self._nodes.get(*reader)
        full = len(self.leases) >= self._limits.max_read_leases
        if holder is not None:
            full = full or self.leases.num_of(holder.info.id) >= self._limits.max_leases_per_node
        if owner is not None and not full and self._has_share(owner, holder):
            self._counts["leases_over_share"] += 1
            return 0
        if full or (holder is None and not self._nobody_may_pin(self._index.bytes_of(rows))):
            self._counts["leases_refused"] += 1
            return 0
        node_id = holder.info.id if holder else None
        lease_id = self.leases.grant(rows, node_id, name, reader=reader, began=now, owner=owner)
        self._deadlines.set((Expiry.READ_LEASE, lease_id), now + lease_s)
        return lease_id

    def _has_share(self, owner: OwnerTag, holder: LiveNode | None) -> bool:
        """Whether this tenant's prompts have as many leases as one may, in all or at this node."""
        limits, share = self._limits, self._limits.owners_share
        if self.leases.num_of_owner(owner) >= share * limits.max_read_leases:
            return True
        if holder is None:
            return False
        return self.leases.num_of_owner(owner, holder.info.id) >= share * limits.max_leases_per_node

    def _nobody_may_pin(self, num_bytes: int) -> bool:
        share = self._limits.nobodys_share
        if self.leases.num_nobodys >= share * self._limits.max_read_leases:
            return False
        return self.leases.nobodys_bytes + num_bytes <= share * self._index.rooms.size_bytes
