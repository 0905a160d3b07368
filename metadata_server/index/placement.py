"""Chooses the segment for each chunk of one request and makes room in it. Pure: works on SegmentRecords.

The whole cluster's memory is the cache: nothing is evicted while any segment has room. First without evicting: the
wished-for segment (a put there *is* the transfer to its reader), the writer's own, the others from the emptiest on.
Only when all are full one evicts: in the first two where what goes is old enough, else where the oldest lies.
"""

import bisect
import itertools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvcore.config.schema import StoreConfig
from kvcore.types import OwnerTag
from metadata_server.index.segments import Replica, SegmentRecord

_OLD_SHARE = 0.5
"""Old is what was not used for this share of the longest time that any chunk was not: half of an even load's."""


@dataclass(frozen=True, slots=True)
class Place:
    """Allocated room."""

    record: SegmentRecord
    offset: int


class Placer:
    """Places the chunks of one request, in the order of their prefix, while nothing else changes the segments.

    They stay together: the next one goes where the last one went as long as there is room. The request sorts the
    segments at most twice, by free room and by age, and looks at one without room no second time.
    """

    def __init__(
        self,
        config: StoreConfig,
        *,
        prefer: SegmentRecord | None,
        own: Iterable[SegmentRecord],
        segments: Collection[SegmentRecord],
        owner: OwnerTag | None = None,
    ) -> None:
        """`segments` are all there are, with `prefer` and `own`. `owner`: whose chunks they are, as far as known."""
        self.evicted: list[Replica] = []
        """On the way to room, found or not: the caller is to forget them, and to clear the list."""
        self.evicted_own = 0
        """Of `evicted`, for the owner's share."""
        self.over_share = False
        """A chunk found no room where its owner has its share, and nothing of its own could go."""
        self.owner = owner
        self._high, self._low = config.high_watermark, config.low_watermark
        self._near = list(dict.fromkeys([*([prefer] if prefer is not None else []), *own]))
        self._segments = segments
        self._order = self._near
        """Near ones, once these are full also the others, the emptiest first."""
        self._open = list(self._near)
        """Of `_order`, those that may have room for less than `_too_long` bytes; and where room was made."""
        self._too_long = math.inf
        self._hopeless = math.inf
        """Chunks of so many bytes find no room even by evicting."""
        self._oldest: list[SegmentRecord] | None = None
        """All segments, those first whose next victim is the oldest; once one has to evict."""

    def place(self, length: int, without: Collection[str] = ()) -> Place | None:
        """Room of `length` bytes in a segment whose id is not in `without`; None: there is none, even by evicting."""
        if length >= self._hopeless:
            return None
        if length < self._too_long:
            self._open, self._too_long = list(self._order), math.inf
        found = self._place_free(length, without) or self._place_evicting(length, without)
        if found is None and not without:
            self._hopeless = length
        return found

    def _place_free(self, length: int, without: Collection[str]) -> Place | None:
        at = 0
        while at < len(self._open) or self._look_farther():
            record = self._open[at]
            if record.segment.id in without:
                at += 1
                continue
            offset = record.allocate(length, self._high, self.owner)
            if offset is not None:
                return Place(record, offset)
            del self._open[at]
            self._too_long = min(self._too_long, length)
        return None

    def _look_farther(self) -> bool:
        """Let the other segments be looked at, too. False: they are already."""
        if self._order is not self._near:
            return False
        near = set(self._near)
        far = [record for record in self._segments if record not in near]
        far.sort(key=lambda record: -record.allocator.free)
        self._order = self._near + far
        self._open += far
        return bool(far)

    def _place_evicting(self, length: int, without: Collection[str]) -> Place | None:
        if self._oldest is None:
            self._oldest = sorted(self._segments, key=_youth)
        old_calls = _OLD_SHARE * self._oldest[0].idle_calls if self._oldest else 0.0
        near = [record for record in self._near if not 0 <= record.idle_calls < old_calls]
        for record in itertools.chain(near, (record for record in tuple(self._oldest) if record not in near)):
            if record.segment.id in without:
                continue
            over = record.is_over(self.owner, length)
            offset, victims = record.allocate_evicting(
                length, self._high, self._low, old_calls=old_calls, owner=self.owner
            )
            self.evicted_own += over * len(victims)
            if victims:
                self.evicted += victims
                self._open.append(record)
                self._oldest.remove(record)
                bisect.insort(self._oldest, record, key=_youth)
            if offset is not None:
                return Place(record, offset)
            self.over_share |= over
        return None


def _youth(record: SegmentRecord) -> int:
    return -record.idle_calls
