"""What each tenant's chunks take of one segment or slab, and which of them goes first where a tenant has its share.

Pure. Told by the place's record of all that comes, is used and goes. A row is the record's number of a chunk, in
whatever state. Invariants: `used_bytes` is the room of the rows whose owner is known; an owner's order has its complete
ones.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcore.types import OwnerTag


class VictimOrder(Protocol):
    """In which order the complete rows of a segment or slab go, or those of one tenant there. No victim is kept by a
    reader, a pin or a continuation."""

    def add(self, rows: Sequence[int]) -> None:
        """New ones, of a prompt the last one first: the first shall go last."""
        ...

    def use(self, rows: Sequence[int]) -> None:
        """They were used, at least one; in the same order."""
        ...

    def refresh(self, rows: Sequence[int]) -> None:
        """They were used until now, at least one; in the same order."""
        ...

    def remove(self, row: int) -> None:
        """It is gone, and not because room was needed."""
        ...

    def let_go(self, row: int) -> None:
        """Nothing that is there continues it any more."""
        ...

    def victim(self) -> int | None:
        """The one that goes next; None: none may."""
        ...

    def evict(self) -> int | None:
        """As `victim`; it is gone."""
        ...

    def rows(self) -> Iterable[int]:
        """All of them. Nothing may change meanwhile."""
        ...

    def clear(self) -> None:
        """It is used no more."""
        ...


@dataclass(slots=True)
class TenantShares:
    """What each tenant may have of each segment or slab. `default`: who has no share of its own; None: all of it. `own`
    may be replaced at any time."""

    default: float | None = None
    own: dict[OwnerTag, float] = field(default_factory=dict)

    @property
    def limited(self) -> bool:
        """Whether anybody has less than all."""
        return self.default is not None or bool(self.own)

    def of(self, owner: OwnerTag) -> float | None:
        """None: all of it."""
        return self.own.get(owner, self.default)


@dataclass(frozen=True, slots=True)
class TenantLimit:
    """What each tenant may have of each segment or slab, and how its own chunks are ordered."""

    shares: TenantShares
    new_order: Callable[[], VictimOrder]


class TenantQuotas:
    """Of one segment or slab. Only what has a known owner counts: a chunk that nobody's header or reservation claims
    counts for nobody until its prompt is stored again. Costs some hundred bytes a chunk."""

    def __init__(self, limit: TenantLimit, capacity: int) -> None:
        self._shares, self._capacity = limit.shares, capacity
        self.used_bytes: Counter[OwnerTag] = Counter()
        self._new_order = limit.new_order
        self._owners: dict[int, OwnerTag] = {}
        """By row."""
        self._orders: dict[OwnerTag, VictimOrder] = {}

    def __repr__(self) -> str:
        return f"<TenantQuotas of {len(self.used_bytes)} tenants in {self._capacity} bytes>"

    def most_of(self, owner: OwnerTag) -> int:
        """Bytes that the tenant may have."""
        share = self._shares.of(owner)
        return 1 << 62 if share is None else int(share * self._capacity)

    def left_of(self, owner: OwnerTag) -> int:
        """Bytes that the tenant may have more."""
        return self.most_of(owner) - self.used_bytes[owner]

    def owner(self, row: int) -> OwnerTag | None:
        """Whose the replica is, if that is known."""
        return self._owners.get(row)

    def own(self, row: int, owner: OwnerTag, room_bytes: int) -> bool:
        """The replica is the tenant's. False: that was known."""
        if row in self._owners:
            return False
        self._owners[row] = owner
        self.used_bytes[owner] += room_bytes
        return True

    def completed(self, rows: Iterable[int]) -> None:
        """They may be evicted from now on."""
        for row in rows:
            owner = self._owners.get(row)
            if owner is not None:
                if owner not in self._orders:
                    self._orders[owner] = self._new_order()
                self._orders[owner].add([row])

    def used(self, rows: Iterable[int], *, again: bool) -> None:
        """Complete ones were used; `again`: until now."""
        for row in rows:
            order = self._order_of(row)
            if order is not None:
                (order.refresh if again else order.use)([row])

    def left(self, row: int) -> None:
        """A complete one is not there any more; `freed` follows."""
        order = self._order_of(row)
        if order is not None:
            order.remove(row)

    def let_go(self, row: int) -> None:
        """Nothing that is there continues a complete one any more."""
        order = self._order_of(row)
        if order is not None:
            order.let_go(row)

    def freed(self, row: int, room_bytes: int) -> None:
        """Its room is free again."""
        owner = self._owners.pop(row, None)
        if owner is None:
            return
        self.used_bytes[owner] -= room_bytes
        if not self.used_bytes[owner]:
            del self.used_bytes[owner]
            self._orders.pop(owner, None)

    def evict(self, owner: OwnerTag) -> int | None:
        """The tenant's chunk that goes next, which has left its order: `freed` follows. None: none may."""
        order = self._orders.get(owner)
        return None if order is None else order.evict()

    def clear(self) -> None:
        """The segment is no longer a live node's."""
        for order in self._orders.values():
            order.clear()
        self.used_bytes.clear()
        self._owners.clear()
        self._orders.clear()

    def check(self, rooms: dict[int, int], complete: Iterable[int]) -> None:
        """Assert every invariant. `rooms`: of all replicas by row; `complete`: rows. For tests."""
        used: Counter[OwnerTag] = Counter()
        for row, owner in self._owners.items():
            used[owner] += rooms[row]
        assert used == self.used_bytes
        there = {row for order in self._orders.values() for row in order.rows()}
        assert there == {row for row in complete if row in self._owners}
        for owner, order in self._orders.items():
            victim = order.victim()
            assert all(self._owners[row] == owner for row in order.rows()) and (victim is None or victim in there)

    def _order_of(self, row: int) -> VictimOrder | None:
        owner = self._owners.get(row)
        return None if owner is None else self._orders.get(owner)
