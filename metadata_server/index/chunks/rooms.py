"""Which live segment has the most room, and which has what was not used for longest: found in O(log segments).

Owns the list of segments and their numbers. Two heaps: what a segment is listed with is corrected when it has changed
and is looked for. Invariants: each segment is listed with its room, or is in `_changed`; one with a victim is listed
with a use no later than its victim's last, or is in `_changed` or `_ages_changed`.
"""

import heapq
from collections.abc import Callable, Generator

from metadata_server.index.chunks.segments import SegmentRecord

_Heap = list[tuple[int, int]]


class SegmentRooms:
    """Mutated by MetadataState only, and by the segments, which say that they have changed."""

    def __init__(self) -> None:
        self.records: dict[int, SegmentRecord] = {}
        """By number; none is given twice."""
        self.size_bytes = 0
        """That may be given out in all of them."""
        self._changed: set[SegmentRecord] = set()
        self._ages_changed: set[int] = set()
        self._rooms: dict[int, int] = {}
        self._ages: dict[int, int] = {}
        self._by_room: _Heap = []
        self._by_age: _Heap = []
        self._count = 0

    def __repr__(self) -> str:
        return f"<SegmentRooms {len(self.records)} segments, {self.size_bytes} bytes>"

    def add(self, record: SegmentRecord) -> None:
        """One more segment."""
        record.number, record.changed = self._count, self._changed
        self._count += 1
        self.records[record.number] = record
        self.size_bytes += record.allocator.capacity
        self._changed.add(record)

    def remove(self, record: SegmentRecord) -> None:
        """It is no longer a live node's."""
        del self.records[record.number]
        self.size_bytes -= record.allocator.capacity
        self._changed.discard(record)
        record.changed = set()
        self._ages_changed.discard(record.number)
        self._rooms.pop(record.number, None)
        self._ages.pop(record.number, None)

    def emptiest(self, size: int, unfit: Callable[[SegmentRecord], bool] = lambda _: False) -> SegmentRecord | None:
        """The segment with the longest free extent that may be used, if that has `size` bytes; none that is `unfit`, as
        few are."""
        self._settle()
        heap, passed = self._by_room, _Heap()
        found = None
        while heap and -heap[0][0] >= size:
            room, number = heap[0]
            if self._rooms.get(number) == -room:
                record = self.records[number]
                if not unfit(record):
                    found = record
                    break
                passed.append(heap[0])
            heapq.heappop(heap)
        for entry in passed:
            heapq.heappush(heap, entry)
        return found

    def oldest(self) -> SegmentRecord | None:
        """The segment whose next victim was not used for longest; None: none has any."""
        self._settle()
        while self._ages_changed:
            number = self._ages_changed.pop()
            use, listed = self.records[number].oldest_use, self._ages.get(number)
            if use is not None and (listed is None or use < listed):
                self._list_age(number, use)
        heap = self._by_age
        while heap:
            use, number = heap[0]
            if self._ages.get(number) == use:
                now = self.records[number].oldest_use
                if now == use:
                    return self.records[number]
                if now is None:
                    del self._ages[number]
                else:
                    self._list_age(number, now)
                    continue
            heapq.heappop(heap)
        return None

    def by_age(self) -> Generator[SegmentRecord, None, None]:
        """Segments with a victim, from `oldest` on. To be closed, or used up; the last one may evict meanwhile."""
        passed = list[int]()
        try:
            while (record := self.oldest()) is not None:
                passed.append(record.number)
                heapq.heappop(self._by_age)
                del self._ages[record.number]
                yield record
                self._changed.discard(record)
                self._ages_changed.discard(record.number)
        finally:
            self._changed.update(self.records[number] for number in passed)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        waiting = {record.number for record in self._changed}
        for number, record in self.records.items():
            assert record.number == number and record.changed is self._changed
            assert number in waiting or self._rooms[number] == record.room
            use, listed = record.oldest_use, self._ages.get(number)
            assert use is None or number in waiting | self._ages_changed or (listed is not None and listed <= use)
        assert {(-room, number) for number, room in self._rooms.items()} <= set(self._by_room)
        assert {(use, number) for number, use in self._ages.items()} <= set(self._by_age)
        assert self.size_bytes == sum(record.allocator.capacity for record in self.records.values())

    def _settle(self) -> None:
        for record in self._changed:
            number, room = record.number, record.room
            self._ages_changed.add(number)
            if self._rooms.get(number) != room:
                self._rooms[number] = room
                heapq.heappush(self._by_room, (-room, number))
        self._changed.clear()
        if len(self._by_room) > 64 + 2 * len(self._rooms):
            self._by_room = [(-room, number) for number, room in self._rooms.items()]
            heapq.heapify(self._by_room)

    def _list_age(self, number: int, use: int) -> None:
        self._ages[number] = use
        heapq.heappush(self._by_age, (use, number))
        if len(self._by_age) > 64 + 2 * len(self._ages):
            self._by_age[:] = [(use, number) for number, use in self._ages.items()]
            heapq.heapify(self._by_age)
