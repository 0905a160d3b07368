"""What each tenant's chunks take of one segment, and which of them goes first where a tenant has its share. Pure.

Told by the segment's record of all that comes, is used and goes. Invariants: `used_bytes` is the room of the replicas
whose owner is known, in whatever state; an owner's evictor has its complete ones.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvcore.eviction.base import EvictionPolicy
from kvcore.eviction.chains import Chains
from kvcore.eviction.evictor import Evictor
from kvcore.types import ChunkKey, OwnerTag


@dataclass(frozen=True, slots=True)
class TenantLimit:
    """What each tenant may have of each segment, and how its own chunks are ordered."""

    share: float
    new_policy: Callable[[], EvictionPolicy[ChunkKey]]


class SegmentQuotas:
    """One segment's. Only what has a known owner counts: what was found after a restart counts for nobody until its
    prompt is stored again. `held` says of a complete chunk whether it must stay; `chains` are the segment's."""

    def __init__(
        self, limit: TenantLimit, capacity: int, chains: Chains[ChunkKey], held: Callable[[ChunkKey], bool]
    ) -> None:
        self.most_bytes = int(limit.share * capacity)
        """That one tenant may have."""
        self.used_bytes: Counter[OwnerTag] = Counter()
        self._new_policy = limit.new_policy
        self._chains = chains
        self._held = held
        self._owners: dict[int, OwnerTag] = {}
        """By the replica's id."""
        self._evictors: dict[OwnerTag, Evictor[ChunkKey]] = {}

    def __repr__(self) -> str:
        return f"<SegmentQuotas of {len(self.used_bytes)} tenants, {self.most_bytes} bytes each>"

    def fits(self, owner: OwnerTag, room_bytes: int) -> bool:
        """Whether the tenant may have so much more."""
        return self.used_bytes[owner] + room_bytes <= self.most_bytes

    def own(self, replica_id: int, owner: OwnerTag, room_bytes: int) -> bool:
        """The replica is the tenant's. False: that was known."""
        if replica_id in self._owners:
            return False
        self._owners[replica_id] = owner
        self.used_bytes[owner] += room_bytes
        return True

    def completed(self, replica_id: int, key: ChunkKey) -> None:
        """It may be evicted from now on."""
        owner = self._owners.get(replica_id)
        if owner is None:
            return
        evictor = self._evictors.get(owner)
        if evictor is None:
            evictor = Evictor(self._new_policy(), self._chains, self._held, leads=False)
            self._evictors[owner] = evictor
        evictor.add(key)

    def used(self, replica_id: int, key: ChunkKey, *, again: bool) -> None:
        """A complete one was used; `again`: by the same user, or until now."""
        owner = self._owners.get(replica_id)
        if owner is not None:
            evictor = self._evictors[owner]
            (evictor.refresh if again else evictor.use)(key)

    def left(self, replica_id: int, key: ChunkKey) -> None:
        """A complete one is not there any more; `freed` follows."""
        owner = self._owners.get(replica_id)
        if owner is not None:
            self._evictors[owner].remove(key)

    def freed(self, replica_id: int, room_bytes: int) -> None:
        """Its room is free again."""
        owner = self._owners.pop(replica_id, None)
        if owner is None:
            return
        self.used_bytes[owner] -= room_bytes
        if not self.used_bytes[owner]:
            del self.used_bytes[owner]
            self._evictors.pop(owner, None)

    def evict(self, owner: OwnerTag) -> ChunkKey | None:
        """The tenant's chunk that goes next, which has left its evictor: `freed` follows. None: none may."""
        evictor = self._evictors.get(owner)
        return None if evictor is None else evictor.evict()

    def clear(self) -> None:
        """The segment is no longer a live node's."""
        self.used_bytes.clear()
        self._owners.clear()
        self._evictors.clear()

    def check(self, rooms: dict[int, int], complete: dict[ChunkKey, int]) -> None:
        """Assert every invariant. `rooms`: of all replicas by id; `complete`: ids by key. For tests."""
        used: Counter[OwnerTag] = Counter()
        for replica_id, owner in self._owners.items():
            used[owner] += rooms[replica_id]
        assert used == self.used_bytes
        for owner, evictor in self._evictors.items():
            victim = evictor.victim()
            assert victim is None or (self._owners[complete[victim]] == owner and not self._held(victim))
