"""Hands out extents of a segment or a slab: 4096-aligned, best fit, neighbours coalesced on free.

Owns free space only; who holds an extent, and how long it is, is its caller's business, so that what is taken costs no
memory here. Invariant: no two free extents touch or overlap. Operations are O(log(distinct free sizes)).
"""

from bisect import bisect_left, insort
from collections.abc import Iterable

ALIGNMENT = 4096


def aligned(length: int) -> int:
    """`length` rounded up to whole alignment units."""
    return -(-length // ALIGNMENT) * ALIGNMENT


class ExtentAllocator:
    """Space of `size_bytes`, of which a rest shorter than the alignment is never used."""

    def __init__(self, size_bytes: int, taken: Iterable[tuple[int, int]] = ()) -> None:
        """`taken`: (offset, length) in use from the start; aligned offsets, disjoint and inside, else ValueError."""
        self.capacity = size_bytes // ALIGNMENT * ALIGNMENT
        self.used = 0
        self._free_sizes: dict[int, int] = {}  # start -> size
        self._free_starts: dict[int, int] = {}  # end -> start
        self._by_size: dict[int, dict[int, None]] = {}
        self._sizes: list[int] = []  # distinct free sizes, sorted
        self._map: bytearray | None = None  # a byte a unit, 1 where it is taken; while `take` is used
        end = 0
        for offset, length in sorted(taken):
            size = aligned(length)
            if offset % ALIGNMENT or offset < end or size <= 0 or offset + size > self.capacity:
                raise ValueError(f"extent at {offset} of {length} bytes overlaps, is unaligned or lies outside")
            self._add_free(end, offset - end)
            self.used += size
            end = offset + size
        self._add_free(end, self.capacity - end)

    @property
    def free(self) -> int:
        """Bytes free, in however many pieces."""
        return self.capacity - self.used

    @property
    def largest_free(self) -> int:
        """The longest extent that could be given out now."""
        return self._sizes[-1] if self._sizes else 0

    def allocate(self, length: int) -> int | None:
        """Offset of an extent of at least `length` > 0 bytes, or None if no free one is long enough."""
        offsets = self.allocate_run(length, 1)
        return offsets[0] if offsets else None

    def allocate_run(self, length: int, count: int) -> list[int]:
        """Offsets of up to `count` extents of `length` > 0 bytes each, fewer where there is no room for more. Those
        that come out of one free extent are neighbours."""
        size = aligned(length)
        offsets: list[int] = []
        while count > 0:
            at = bisect_left(self._sizes, size)
            if at == len(self._sizes):
                break
            found = self._sizes[at]
            start = next(reversed(self._by_size[found]))
            number = min(count, found // size)
            end = start + number * size
            self._remove_free(start, found)
            self._add_free(end, start + found - end)
            self._mark(start, end - start, 1)
            offsets += range(start, end, size)
            count -= number
        self.used += size * len(offsets)
        return offsets

    def take(self, offset: int, length: int) -> bool:
        """Take the extent of `length` > 0 bytes at `offset`. False: it is not aligned, not inside, or not free.

        For a space whose use is learned by and by. It keeps a byte a unit until `settle` says that this is over; each
        call looks as far as the extent's free neighbourhood goes.
        """
        size = aligned(length)
        if offset % ALIGNMENT or offset < 0 or size <= 0 or offset + size > self.capacity:
            return False
        if self._map is None:
            self._map = bytearray(b"\x01") * (self.capacity // ALIGNMENT)
            for start, free in self._free_sizes.items():
                self._mark(start, free, 0)
        first, last = offset // ALIGNMENT, (offset + size) // ALIGNMENT
        if self._map.find(1, first, last) >= 0:
            return False
        start = (self._map.rfind(1, 0, first) + 1) * ALIGNMENT
        after = self._map.find(1, last)
        end = self.capacity if after < 0 else after * ALIGNMENT
        self._remove_free(start, end - start)
        self._add_free(start, offset - start)
        self._add_free(offset + size, end - offset - size)
        self.used += size
        self._mark(offset, size, 1)
        return True

    def settle(self) -> None:
        """No `take` will come, for now."""
        self._map = None

    def release(self, offset: int, length: int) -> None:
        """Free the extent of `length` bytes at `offset`, or several that are neighbours. KeyError where it is free."""
        size = aligned(length)
        start, end = offset, offset + size
        if start in self._free_sizes or end in self._free_starts:
            raise KeyError(offset)
        self.used -= size
        self._mark(offset, size, 0)
        after = self._free_sizes.get(end)
        if after is not None:
            self._remove_free(end, after)
            end += after
        before = self._free_starts.get(start)
        if before is not None:
            self._remove_free(before, start - before)
            start = before
        self._add_free(start, end - start)

    def check(self, taken: Iterable[tuple[int, int]]) -> None:
        """Assert that free space and `taken`, (offset, length) each, tile the whole. O(n log n), for tests."""
        sizes = [(offset, aligned(length)) for offset, length in taken]
        assert self.used == sum(size for _, size in sizes)
        pieces = sorted([(s, n, False) for s, n in sizes] + [(s, n, True) for s, n in self._free_sizes.items()])
        end, was_free = 0, False
        for start, size, is_free in pieces:
            assert start == end and size > 0 and size % ALIGNMENT == 0, f"gap or overlap at {end}"
            assert not (is_free and was_free), f"free neighbours at {start}"
            end, was_free = start + size, is_free
        assert end == self.capacity
        assert self._free_starts == {s + n: s for s, n in self._free_sizes.items()}
        assert self._sizes == sorted(self._by_size) and all(self._by_size.values())
        assert {s: n for n, starts in self._by_size.items() for s in starts} == self._free_sizes
        if self._map is not None:
            assert sum(self._map) * ALIGNMENT == self.used
            assert all(all(self._map[s // ALIGNMENT : (s + n) // ALIGNMENT]) for s, n in sizes)

    def _mark(self, start: int, size: int, taken: int) -> None:
        if self._map is not None:
            units = size // ALIGNMENT
            self._map[start // ALIGNMENT : start // ALIGNMENT + units] = bytes((taken,)) * units

    def _add_free(self, start: int, size: int) -> None:
        if size == 0:
            return
        self._free_sizes[start] = size
        self._free_starts[start + size] = start
        starts = self._by_size.get(size)
        if starts is None:
            self._by_size[size] = {start: None}
            insort(self._sizes, size)
        else:
            starts[start] = None

    def _remove_free(self, start: int, size: int) -> None:
        del self._free_sizes[start], self._free_starts[start + size]
        starts = self._by_size[size]
        del starts[start]
        if not starts:
            del self._by_size[size]
            del self._sizes[bisect_left(self._sizes, size)]
