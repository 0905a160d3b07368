"""How segments come into the index: by the cluster's rules, with what their node says lies there. Pure."""

from functools import partial

from kvcore.config.schema import StoreConfig
from kvcore.eviction.quotas import TenantLimit, TenantShares
from kvcore.extents import ALIGNMENT, ExtentAllocator, aligned
from kvcore.types import Segment
from metadata_server.index.chunks.calls import CallCount
from metadata_server.index.chunks.orders import new_key_order, new_order
from metadata_server.index.chunks.rows import ReplicaTable
from metadata_server.index.chunks.rules import RoomRules
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.limits import IndexLimits
from metadata_server.messages import ManifestEntry, Room


class NewSegments:
    """Makes the records of all segments of one index."""

    def __init__(
        self,
        config: StoreConfig,
        limits: IndexLimits,
        table: ReplicaTable,
        calls: CallCount,
        shares: TenantShares | None,
    ) -> None:
        self._eviction, self._table, self._calls = config.eviction, table, calls
        tenants, shares = None, shares or TenantShares(config.tenant_share)
        if shares.limited:
            tenants = TenantLimit(shares, partial(new_key_order, config.eviction, table, calls))
        self._rules = RoomRules(config.high_watermark, config.low_watermark, limits.most_evicted, tenants)

    def record(self, segment: Segment, entries: list[ManifestEntry], room: Room | None = None) -> SegmentRecord:
        """Of a segment with room taken by `entries`, which `acceptable` gave, and each of which is to be adopted.
        `room`: what may be given out of it; None: all."""
        order, table = new_order(self._eviction, self._table, self._calls), self._table
        room = room or Room(start=0, length=segment.size_bytes)
        allocator = ExtentAllocator(room.length, [(entry.offset, entry.length) for entry in entries], start=room.start)
        return SegmentRecord(segment, allocator, self._calls, table=table, order=order, rules=self._rules)


def acceptable(room: Room, entries: list[ManifestEntry]) -> list[ManifestEntry]:
    """Entries that may be adopted, newest generation first: inside, aligned, disjoint, one a key."""
    limit = room.start + room.length // ALIGNMENT * ALIGNMENT
    taken = bytearray(limit // ALIGNMENT)  # a byte a unit: overlap is one memchr
    keys: set[bytes] = set()
    accepted: list[ManifestEntry] = []
    for entry in sorted(entries, key=lambda e: (-e.generation, e.offset)):
        end = entry.offset + aligned(entry.length)
        if entry.offset % ALIGNMENT or entry.offset < room.start or end > limit or entry.key in keys:
            continue
        first, last = entry.offset // ALIGNMENT, end // ALIGNMENT
        if taken.find(1, first, last) >= 0:
            continue
        taken[first:last] = b"\x01" * (last - first)
        keys.add(entry.key)
        accepted.append(entry)
    return accepted
