"""Hands out extents of a segment or a slab: 4096-aligned, best fit, neighbours coalesced on free.

Owns free space only; who holds an extent is its caller's business. Invariant: free and taken extents tile
[0, capacity) without gap or overlap, and no two free ones touch. Operations are O(log(distinct free sizes)).
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
        self._taken: dict[int, int] = {}
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
            self._taken[offset] = size
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
        size = aligned(length)
        at = bisect_left(self._sizes, size)
        if at == len(self._sizes):
            return None
        found = self._sizes[at]
        start = next(reversed(self._by_size[found]))
        self._remove_free(start, found)
        self._add_free(start + size, found - size)
        self._taken[start] = size
        self.used += size
        self._mark(start, size, 1)
        return start

    def take(self, offset: int, length: int) -> bool:
        """Take the extent of `length` > 0 bytes at `offset`. False: it is not aligned, not inside, or not free.

        For a space whose use is learned by and by. It keeps a byte a unit until `settle` says that this is over; each
        call looks as far as the extent's free neighbourhood goes.
        """
        size = aligned(length)
        if offset % ALIGNMENT or offset < 0 or size <= 0 or offset + size > self.capacity:
            return False
        if self._map is None:
            self._map = bytearray(self.capacity // ALIGNMENT)
            for start, taken in self._taken.items():
                self._mark(start, taken, 1)
        first, last = offset // ALIGNMENT, (offset + size) // ALIGNMENT
        if self._map.find(1, first, last) >= 0:
            return False
        start = (self._map.rfind(1, 0, first) + 1) * ALIGNMENT
        after = self._map.find(1, last)
        end = self.capacity if after < 0 else after * ALIGNMENT
        self._remove_free(start, end - start)
        self._add_free(start, offset - start)
        self._add_free(offset + size, end - offset - size)
        self._taken[offset] = size
        self.used += size
        self._mark(offset, size, 1)
        return True

    def settle(self) -> None:
        """No `take` will come, for now."""
        self._map = None

    def release(self, offset: int) -> None:
        """Free the extent that begins at `offset`. KeyError if none does."""
        size = self._taken.pop(offset)
        self.used -= size
        self._mark(offset, size, 0)
        start, end = offset, offset + size
        after = self._free_sizes.get(end)
        if after is not None:
            self._remove_free(end, after)
            end += after
        before = self._free_starts.get(start)
        if before is not None:
            self._remove_free(before, start - before)
            start = before
        self._add_free(start, end - start)

    def check(self) -> None:
        """Assert every invariant. O(n log n), for tests."""
        assert self.used == sum(self._taken.values())
        pieces = sorted(
            [(s, n, False) for s, n in self._taken.items()] + [(s, n, True) for s, n in self._free_sizes.items()]
        )
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
            assert all(all(self._map[s // ALIGNMENT : (s + n) // ALIGNMENT]) for s, n in self._taken.items())

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
