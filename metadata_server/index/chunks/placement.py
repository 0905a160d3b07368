"""Chooses the segment for each chunk of one request and makes room in it. Pure: works on SegmentRecords.

The whole cluster's memory is the cache: nothing is evicted while any segment has room. First without evicting: the
wished-for segment (a put there *is* the transfer to its reader), the writer's own, the one with the most room in one
piece. Only when all are full one evicts: in the first two where what goes is old enough, else where the oldest lies.
"""

import math
from collections.abc import Collection, Iterable
from contextlib import closing
from dataclasses import dataclass

from kvcore.extents import aligned
from kvcore.types import OwnerTag
from metadata_server.index.chunks.rooms import SegmentRooms
from metadata_server.index.chunks.segments import SegmentRecord

_OLD_SHARE = 0.5
"""Old is what was not used for this share of the longest time that any chunk was not: half of an even load's."""


@dataclass(frozen=True, slots=True)
class Place:
    """Allocated room for one chunk or several."""

    record: SegmentRecord
    offsets: list[int]


class Placer:
    """Places the chunks of one request, in the order of their prefix, while nothing else changes the segments.

    They stay together: the next one goes where the last one went as long as there is room. Each step looks at the near
    segments and at O(log segments) others.
    """

    def __init__(
        self,
        rooms: SegmentRooms,
        *,
        prefer: SegmentRecord | None,
        own: Iterable[SegmentRecord],
        only_preferred: bool = False,
        owner: OwnerTag | None = None,
        closed: Collection[str] = (),
    ) -> None:
        """`only_preferred`: no room is wanted elsewhere. `owner`: whose chunks they are, as far as known. `closed`: ids
        of segments that take no chunks, which are few."""
        self.evicted: list[int] = []
        """Rows of those that went on the way to room, found or not: the caller is to forget them, and to clear the
        list."""
        self.evicted_own = 0
        """Of `evicted`, for the owner's share."""
        self.over_share = False
        """A chunk found no room where its owner has its share, and nothing of its own could go."""
        self.owner = owner
        self._rooms = rooms
        self._only_preferred = only_preferred
        self._closed = closed
        wished = [prefer] if prefer is not None else []
        self._near = wished if only_preferred else list(dict.fromkeys([*wished, *own]))
        self._last: SegmentRecord | None = None
        self._hopeless = math.inf
        """Chunks of so many bytes find no room even by evicting."""

    def place(self, length: int, count: int = 1, without: Collection[str] = ()) -> Place | None:
        """Room for some of `count` chunks of `length` bytes, in one segment whose id is not in `without`; None: there
        is none, even by evicting."""
        if length >= self._hopeless:
            return None
        found = self._place_free(length, count, without) or self._place_evicting(length, count, without)
        if found is None and not without:
            self._hopeless = length
        return found

    def _place_free(self, length: int, count: int, without: Collection[str]) -> Place | None:
        size, owner = aligned(length), self.owner

        def unfit(record: SegmentRecord) -> bool:
            return record.segment.id in without or record.segment.id in self._closed or record.is_over(owner, length)

        for record in self._near if self._last is None else (*self._near, self._last):
            if record.room >= size and not unfit(record):
                return Place(record, record.allocate(length, count, owner))
        if self._only_preferred:
            return None
        found = self._rooms.emptiest(size, unfit)
        if found is None:
            return None
        self._last = found
        return Place(found, found.allocate(length, count, owner))

    def _place_evicting(self, length: int, count: int, without: Collection[str]) -> Place | None:
        oldest = self._rooms.oldest()
        old_calls = _OLD_SHARE * oldest.idle_calls if oldest is not None else 0.0
        tried = set[SegmentRecord]()
        for record in self._near:
            if self._only_preferred or not 0 <= record.idle_calls < old_calls:
                tried.add(record)
                if (place := self._evict_in(record, length, count, without, old_calls)) is not None:
                    return place
        if self._only_preferred:
            return None
        with closing(self._rooms.by_age()) as by_age:
            for record in by_age:
                if record not in tried:
                    tried.add(record)
                    if (place := self._evict_in(record, length, count, without, old_calls)) is not None:
                        return place
        for record in self._rooms.records.values():  # those with nothing to evict may have room above their high share
            if record not in tried and (place := self._evict_in(record, length, count, without, old_calls)) is not None:
                return place
        return None

    def _evict_in(
        self, record: SegmentRecord, length: int, count: int, without: Collection[str], old_calls: float
    ) -> Place | None:
        if record.segment.id in without or record.segment.id in self._closed:
            return None
        over = record.is_over(self.owner, length)
        offsets, victims = record.allocate_evicting(length, count, old_calls=old_calls, owner=self.owner)
        self.evicted += victims
        self.evicted_own += over * len(victims)
        self.over_share |= over and not offsets
        return Place(record, offsets) if offsets else None
