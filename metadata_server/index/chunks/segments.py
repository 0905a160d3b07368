"""One segment's replicas: where they lie, how much they take, which one goes first.

Owns placement inside of the segment, accounting and the order of eviction; not the index of keys. Invariants: each
replica holds exactly one extent; the order has the complete ones, and no victim has a pin; the counts are sums.
"""

from collections.abc import Iterable, Sequence

from msgspec import UnsetType

from kvcore.eviction.quotas import TenantQuotas, VictimOrder
from kvcore.eviction.row_chains import FIRST
from kvcore.extents import ExtentAllocator, aligned
from kvcore.types import OwnerTag, Segment
from metadata_server.account_messages import SegmentStats
from metadata_server.index.chunks.calls import CallCount
from metadata_server.index.chunks.rows import NOTHING, TRANSITIONS, ReplicaState, ReplicaTable
from metadata_server.index.chunks.rules import RoomRules

_RESERVED, _COMPLETE, _RETIRING = ReplicaState.RESERVED, ReplicaState.COMPLETE, ReplicaState.RETIRING


class SegmentRecord:
    """A live node's segment."""

    def __init__(
        self,
        segment: Segment,
        allocator: ExtentAllocator,
        calls: CallCount,
        *,
        table: ReplicaTable,
        order: VictimOrder,
        rules: RoomRules = RoomRules(),
    ) -> None:
        """`allocator`: of the room to give out; what it has taken is to be adopted. `calls`: one for all segments."""
        self.segment = segment
        self.number = -1  # of the record, while it is listed in the index
        self.allocator = allocator
        self.num_complete, self.rebuilding = 0, False
        self.gone = False  # no longer a live node's: its room is nobody's any more
        self.changed: set[SegmentRecord] = set()
        """It puts itself there when its room or next victim may be another; set by who lists segments by these."""
        self.incomplete: dict[int, None] = {}  # reserved and retiring ones
        self._table, self._order, self._calls = table, order, calls
        self._limit, self._low = int(rules.high * self.allocator.capacity), int(rules.low * self.allocator.capacity)
        self._most_evicted = rules.most_evicted
        self._quotas = TenantQuotas(rules.tenants, self.allocator.capacity) if rules.tenants is not None else None
        self._bytes_in = [0] * (1 + len(ReplicaState))

    def __repr__(self) -> str:
        use = f"{self.allocator.used} of {self.allocator.capacity} bytes"
        count = self.num_complete + len(self.incomplete)
        return f"<SegmentRecord {self.segment.id}: {use}, {count} replicas, {self._order}>"

    @property
    def room(self) -> int:
        """Length of the longest chunk that could be placed now without eviction."""
        used, longest = self.allocator.used, 0 if self.rebuilding else self.allocator.largest_free
        return min(longest, self._limit - used) if used else longest

    @property
    def oldest_use(self) -> int | None:
        """The call of the last use of the replica that is evicted next; None: none can be."""
        victim = None if self.rebuilding else self._order.victim()
        return None if victim is None else self._table.last_uses[victim]

    @property
    def idle_calls(self) -> int:
        """Calls since the last use of the replica that is evicted next; -1: none can be."""
        use = self.oldest_use
        return -1 if use is None else self._calls.so_far - use

    def is_over(self, owner: OwnerTag | None, length: int) -> bool:
        """Whether this would be more than the tenant (None: without a limit) may have here."""
        return self._quotas is not None and owner is not None and self._quotas.left_of(owner) < aligned(length)

    def allocate(self, length: int, count: int = 1, owner: OwnerTag | None = None) -> list[int]:
        """Offsets of room for up to `count` chunks that needs no eviction: the use stays at or under the high share, or
        this is all."""
        size, used = aligned(length), self.allocator.used
        count = min(count, max((self._limit - used) // size, 0 if used else 1))
        if self._quotas is not None and owner is not None:
            count = min(count, self._quotas.left_of(owner) // size)
        self.changed.add(self)
        return self.allocator.allocate_run(length, count)

    def allocate_evicting(
        self, length: int, count: int = 1, *, old_calls: float = 0.0, owner: OwnerTag | None = None
    ) -> tuple[list[int], list[int]]:
        """As `allocate`, after eviction if the use would pass the high share; with the rows that were evicted.

        Makes room for one, and goes on down to the low share with what was not used for `old_calls`. Also evicts
        against fragmentation, but no more bytes for that than twice what is asked. A tenant that would pass its share:
        only its own is evicted, for one chunk.
        """
        size, space, table = aligned(length), self.allocator, self._table
        if self.rebuilding or size > space.capacity:
            return [], []
        if owner is not None and self.is_over(owner, length):
            return self._allocate_from_own(length, owner)
        evicted = self._evict_for(size, old_calls)
        self._free(evicted)
        spent = 0
        while space.largest_free < size and spent < 2 * size and (row := self._evict_next()) is not None:
            self._free([row])
            evicted.append(row)
            spent += aligned(table.lengths[row])
        offsets = space.allocate_run(length, 1)
        if offsets and count > 1:
            if self._quotas is not None and owner is not None:
                count = min(count, self._quotas.left_of(owner) // size)
            offsets += self.allocate(length, count - 1)
        self.changed.add(self)
        return offsets, evicted

    def reserve(self, rows: Sequence[int]) -> None:
        """Add reserved replicas whose extents are allocated already."""
        states, incomplete = self._table.states, self.incomplete
        for row in rows:
            states[row] = _RESERVED
            incomplete[row] = None
        self._bytes_in[_RESERVED] += self._table.room_of(rows)

    def rebuild(self, rebuilding: bool) -> None:
        """Whether not all is known that lies here: then it gives no room, and nothing here is evicted."""
        self.rebuilding = rebuilding
        self.changed.add(self)

    def owner(self, row: int) -> OwnerTag | None:
        """Whose replica it is; None: that is not known, or nobody's share is limited."""
        return None if self._quotas is None else self._quotas.owner(row)

    def own(self, row: int, owner: OwnerTag) -> None:
        """Say whose replica it is, if that is not known yet."""
        quotas, size = self._quotas, aligned(self._table.lengths[row])
        if quotas is not None and quotas.own(row, owner, size) and self._table.states[row] == _COMPLETE:
            quotas.completed([row])

    def adopt(self, rows: Sequence[int], owners: Iterable[OwnerTag | UnsetType]) -> None:
        """Add complete replicas whose extents are taken already; the first one will be evicted first."""
        self._bytes_in[_COMPLETE] += self._table.room_of(rows)
        self._completed(rows)
        for row, owner in zip(rows, owners, strict=True) if self._quotas is not None else ():
            if isinstance(owner, bytes):
                self.own(row, owner)

    def commit(self, rows: Sequence[int]) -> None:
        """Reserved replicas are complete. In the order of their prefix: its tail will be evicted first."""
        states, incomplete, size = self._table.states, self.incomplete, self._table.room_of(rows)
        for row in rows:
            assert states[row] == _RESERVED
            del incomplete[row]
        self._bytes_in[_RESERVED] -= size
        self._bytes_in[_COMPLETE] += size
        self._completed(rows[::-1])

    def retire(self, row: int) -> None:
        """The replica's room is to rest."""
        state, size = self._table.states[row], aligned(self._table.lengths[row])
        assert _RETIRING in TRANSITIONS[ReplicaState(state)]
        if state == _COMPLETE:
            self._take_out(row)
            self.incomplete[row] = None
        self._bytes_in[state] -= size
        self._bytes_in[_RETIRING] += size
        self._table.states[row] = _RETIRING
        self._unchain(row)

    def remove(self, row: int) -> None:
        """Give up a replica and free its room. Leases on it stay valid to end, and protect nothing."""
        state = self._table.states[row]
        if state == _COMPLETE:
            self._take_out(row)
        else:
            del self.incomplete[row]
        self._bytes_in[state] -= aligned(self._table.lengths[row])
        self._unchain(row)
        self._free([row])
        self.changed.add(self)

    def clear(self) -> None:
        """It is used no more, and nothing is left in it."""
        self._order.clear()
        self.changed = set()
        if self._quotas is not None:
            self._quotas.clear()

    def use(self, rows: Sequence[int]) -> None:
        """Complete replicas are used; of a prompt the last one comes first."""
        now, last_uses = self._calls.so_far, self._table.last_uses
        for row in rows:
            last_uses[row] = now
        self._order.use(rows)
        self.changed.add(self)  # by some policies another goes next, which may be older
        if self._quotas is not None:
            self._quotas.used(rows, again=False)

    def refresh(self, rows: Sequence[int]) -> None:
        """As `use`, by somebody who uses them no longer: that is recent, but no other use."""
        now, last_uses = self._calls.so_far, self._table.last_uses
        for row in rows:
            last_uses[row] = now
        self._order.refresh(rows)
        if self._quotas is not None:
            self._quotas.used(rows, again=True)
        self.changed.add(self)

    def complete(self) -> Iterable[int]:
        """Rows of those that can be read. Nothing may change meanwhile."""
        return self._order.rows()

    def rows(self) -> list[int]:
        """All of them, in any state."""
        return [*self._order.rows(), *self.incomplete]

    def stats(self) -> SegmentStats:
        """Use of the segment."""
        return SegmentStats(
            segment=self.segment,
            used_bytes=self.allocator.used,
            reserved_bytes=self._bytes_in[_RESERVED],
            retiring_bytes=self._bytes_in[_RETIRING],
            room_bytes=self.allocator.capacity,
            num_replicas=self.num_complete,
            rebuilding=self.rebuilding,
        )

    def check(self) -> None:
        """Assert every invariant. For tests."""
        table, rows = self._table, self.rows()
        assert len(set(rows)) == len(rows) == self.num_complete + len(self.incomplete)
        self.allocator.check((table.offsets[row], table.lengths[row]) for row in rows)
        for state in ReplicaState:
            assert self._bytes_in[state] == sum(aligned(table.lengths[r]) for r in rows if table.states[r] == state)
        assert all(table.states[row] == _COMPLETE for row in self.complete())
        assert all(table.states[row] in {_RESERVED, _RETIRING} for row in self.incomplete)
        for row in rows:
            parent = table.parents[row]
            assert table.segments[row] == self.number and (parent < 0 or table.segments[parent] == self.number)
        victim = self._order.victim()
        assert victim is None or not table.kept(victim)
        if self._quotas is not None:
            self._quotas.check({row: aligned(table.lengths[row]) for row in rows}, self.complete())

    def _take_out(self, row: int) -> None:
        """A complete one is evicted no more."""
        if self._quotas is not None:
            self._quotas.left(row)
        self._order.remove(row)
        self.num_complete -= 1
        self.changed.add(self)

    def _completed(self, rows: Sequence[int]) -> None:
        states, last_uses, now = self._table.states, self._table.last_uses, self._calls.so_far
        for row in rows:
            states[row] = _COMPLETE
            last_uses[row] = now
        self.num_complete += len(rows)
        self._order.add(rows)
        if self._quotas is not None:
            self._quotas.completed(rows)
        self.changed.add(self)

    def _allocate_from_own(self, length: int, owner: OwnerTag) -> tuple[list[int], list[int]]:
        """Room for a tenant that has its share: what makes it is its own, and no other's."""
        quotas, size, evicted, spent = self._quotas, aligned(length), list[int](), 0
        assert quotas is not None
        most = quotas.most_of(owner)
        while quotas.left_of(owner) < size <= most or (
            size <= most and self.allocator.largest_free < size and spent < 2 * size
        ):
            fits = quotas.left_of(owner) >= size
            row = quotas.evict(owner)
            if row is None:
                break
            self._order.remove(row)
            self._count_gone(row)
            self._free([row])
            evicted.append(row)
            spent += aligned(self._table.lengths[row]) if fits else 0
        self.changed.add(self)
        return self.allocator.allocate_run(length, 1) if quotas.left_of(owner) >= size else [], evicted

    def _evict_for(self, size: int, old_calls: float) -> list[int]:
        """Evict until there is room for `size` bytes by the rules; the extents are still to be freed."""
        used, lengths, last_uses = self.allocator.used, self._table.lengths, self._table.last_uses
        evicted: list[int] = []
        if used + size <= self._limit:
            return evicted
        while used + size > self._low:
            row = self._order.victim()
            if row is None:
                break
            if used + size <= self._limit and (
                len(evicted) >= self._most_evicted or self._calls.so_far - last_uses[row] < old_calls
            ):
                break
            self._evict_next()
            evicted.append(row)
            used -= aligned(lengths[row])
        return evicted

    def _evict_next(self) -> int | None:
        row = self._order.evict()
        if row is not None:
            if self._quotas is not None:
                self._quotas.left(row)
            self._count_gone(row)
        return row

    def _count_gone(self, row: int) -> None:
        self.num_complete -= 1
        self._bytes_in[_COMPLETE] -= aligned(self._table.lengths[row])
        self._unchain(row)

    def _unchain(self, row: int) -> None:
        """What it continued has one continuation less."""
        parent = self._table.chains.left(row)
        if parent == FIRST:
            return
        state = self._table.states[parent]
        if state == NOTHING:
            self._table.release(parent)
        elif state == _COMPLETE:
            self._order.let_go(parent)
            if self._quotas is not None:
                self._quotas.let_go(parent)
            self.changed.add(self)

    def _free(self, rows: list[int]) -> None:
        """Free the extents of `rows`, neighbours together."""
        if self.gone:
            return
        offsets, lengths = self._table.offsets, self._table.lengths
        start = end = 0
        for offset, row in sorted((offsets[row], row) for row in rows):
            if offset != end:
                if end:
                    self.allocator.release(start, end - start)
                start = offset
            end = offset + aligned(lengths[row])
        if end:
            self.allocator.release(start, end - start)
        if self._quotas is not None:
            for row in rows:
                self._quotas.freed(row, aligned(lengths[row]))
