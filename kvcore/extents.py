"""Hands out extents of a segment or a slab: 4096-aligned, best fit, neighbours coalesced on free.

Owns free space only; who holds an extent, and how long it is, is its caller's business, so that what is taken costs no
memory here. Invariant: no two free extents touch or overlap. Operations are O(log(distinct free sizes)).
"""

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator

ALIGNMENT = 4096


def aligned(length: int) -> int:
    """`length` rounded up to whole alignment units."""
    return -(-length // ALIGNMENT) * ALIGNMENT


class ExtentAllocator:
    """Space of `size_bytes` from `start` on, of which a rest shorter than the alignment is never used."""

    def __init__(
        self, size_bytes: int, taken: Iterable[tuple[int, int]] = (), *, start: int = 0, block_bytes: int = 64 << 20
    ) -> None:
        """`taken`: (offset, length) in use from the start; aligned offsets, disjoint and inside, else ValueError.
        `block_bytes`: what `take` has told of so much space is in one list, so that no insertion moves much."""
        self.capacity = size_bytes // ALIGNMENT * ALIGNMENT
        self.start, self.end = start, start + self.capacity
        self.used = 0
        self._free_sizes: dict[int, int] = {}  # start -> size
        self._free_starts: dict[int, int] = {}  # end -> start
        self._by_size: dict[int, dict[int, None]] = {}
        self._sizes: list[int] = []  # distinct free sizes, sorted
        self._told: _Spans | None = None  # what is taken; while `take` is used, and then the free lists say nothing
        self._block = block_bytes
        end = start
        for offset, length in sorted(taken):
            size = aligned(length)
            if offset % ALIGNMENT or offset < end or size <= 0 or offset + size > self.end:
                raise ValueError(f"extent at {offset} of {length} bytes overlaps, is unaligned or lies outside")
            self._add_free(end, offset - end)
            self.used += size
            end = offset + size
        self._add_free(end, self.end - end)

    @property
    def free(self) -> int:
        """Bytes free, in however many pieces."""
        return self.capacity - self.used

    @property
    def largest_free(self) -> int:
        """The longest extent that could be given out now."""
        self.settle()
        return self._sizes[-1] if self._sizes else 0

    def allocate(self, length: int) -> int | None:
        """Offset of an extent of at least `length` > 0 bytes, or None if no free one is long enough."""
        offsets = self.allocate_run(length, 1)
        return offsets[0] if offsets else None

    def allocate_run(self, length: int, count: int) -> list[int]:
        """Offsets of up to `count` extents of `length` > 0 bytes each, fewer where there is no room for more. Those
        that come out of one free extent are neighbours."""
        self.settle()
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
            offsets += range(start, end, size)
            count -= number
        self.used += size * len(offsets)
        return offsets

    def take(self, offset: int, length: int) -> bool:
        """Take the extent of `length` > 0 bytes at `offset`. False: it is not aligned, not inside, or not free.

        For a space whose use is learned by and by: until `settle`, or until room is asked for, taken extents are listed
        (16 bytes for each that has free neighbours), and free ones are not.
        """
        size = aligned(length)
        if offset % ALIGNMENT or offset < self.start or size <= 0 or offset + size > self.end:
            return False
        if self._told is None:
            self._told = _Spans(self._block)
            end = self.start
            for start in sorted(self._free_sizes):
                self._told.flip(end, start)
                end = start + self._free_sizes[start]
            self._told.flip(end, self.end)
            self._forget_free()
        if not self._told.take(offset, offset + size):
            return False
        self.used += size
        return True

    def settle(self) -> None:
        """No `take` will come, for now. O(n) of the free extents if one came."""
        if self._told is not None:
            told, self._told, end = self._told, None, self.start
            for start, stop in told:
                self._add_free(end, start - end)
                end = stop
            self._add_free(end, self.end - end)

    def release(self, offset: int, length: int) -> None:
        """Free the extent of `length` bytes at `offset`, or several that are neighbours. KeyError where it is free."""
        size = aligned(length)
        start, end = offset, offset + size
        if self._told is not None:
            if self._told.lack(start, end):
                raise KeyError(offset)
            self._told.flip(start, end)
            self.used -= size
            return
        if start in self._free_sizes or end in self._free_starts:
            raise KeyError(offset)
        self.used -= size
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
        if self._told is not None:
            assert not (self._free_sizes or self._free_starts or self._by_size or self._sizes)
            assert _joined(self._told) == _joined(sorted((offset, offset + size) for offset, size in sizes))
            return
        pieces = sorted([(s, n, False) for s, n in sizes] + [(s, n, True) for s, n in self._free_sizes.items()])
        end, was_free = self.start, False
        for start, size, is_free in pieces:
            assert start == end and size > 0 and size % ALIGNMENT == 0, f"gap or overlap at {end}"
            assert not (is_free and was_free), f"free neighbours at {start}"
            end, was_free = start + size, is_free
        assert end == self.end
        assert self._free_starts == {s + n: s for s, n in self._free_sizes.items()}
        assert self._sizes == sorted(self._by_size) and all(self._by_size.values())
        assert {s: n for n, starts in self._by_size.items() for s in starts} == self._free_sizes

    def _forget_free(self) -> None:
        self._free_sizes, self._free_starts, self._by_size, self._sizes = {}, {}, {}, []

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


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours as one."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        touches = joined and joined[-1][1] == start
        joined.append((joined.pop()[0] if touches else start, end))
    return joined


class _Spans:
    """Which parts of a space are taken: their edges, sorted, in a list for each block of the space. Neighbours are one.
    An even number of edges before a place says that it is free."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._blocks: dict[int, array[int]] = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Start and end of each, sorted; what reaches over the edge of a block comes in parts."""
        for number in sorted(self._blocks):
            edges = self._blocks[number]
            yield from zip(edges[::2], edges[1::2], strict=True)

    def take(self, start: int, end: int) -> bool:
        """False: not all of it is free."""
        number = start // self._block
        edges = self._blocks.get(number)
        if edges is None or end > (number + 1) * self._block:
            if self.lack(start, end):
                self.flip(start, end)
                return True
            return False
        at = bisect_right(edges, start)
        before, after = (edges[at - 1] if at else -1), (edges[at] if at < len(edges) else -1)
        if at % 2 or start < after < end:
            return False
        if before == start and after == end:
            del edges[at - 1 : at + 1]
        elif before == start:
            edges[at - 1] = end
        elif after == end:
            edges[at] = start
        else:
            edges[at:at] = array("q", (start, end))
        return True

    def lack(self, start: int, end: int) -> bool:
        """Whether all of it is free."""
        block = self._block
        for number in range(start // block, -(-end // block)):
            edges = self._blocks.get(number)
            if edges:
                at = bisect_right(edges, max(start, number * block))
                if at % 2 or (at < len(edges) and edges[at] < end):
                    return False
        return True

    def flip(self, start: int, end: int) -> None:
        """Take all of it, which is free; or free it, which is taken."""
        block = self._block
        for number in range(start // block, -(-end // block)):
            edges = self._blocks.get(number)
            if edges is None:
                edges = self._blocks[number] = array("q")
            for edge in (max(start, number * block), min(end, (number + 1) * block)):
                at = bisect_left(edges, edge)
                if at < len(edges) and edges[at] == edge:
                    del edges[at]
                else:
                    edges.insert(at, edge)
