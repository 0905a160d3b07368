"""Chooses the segment for a chunk and makes room in it. Pure: works on SegmentRecords, returns what was evicted.

First the wished-for segment, evicting if need be (a put there *is* the transfer to its reader); then, without
evicting anything, the writer's own node's and the emptiest; only when all are full, evicting, in the same order.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from kvcore.config.schema import StoreConfig
from metadata_server.index.segments import Replica, SegmentRecord


@dataclass(frozen=True, slots=True)
class Place:
    """Allocated room."""

    record: SegmentRecord
    offset: int


def place(
    length: int,
    config: StoreConfig,
    *,
    prefer: SegmentRecord | None,
    own: Iterable[SegmentRecord],
    allowed: Collection[SegmentRecord],
) -> tuple[Place | None, list[Replica]]:
    """Room of `length` bytes in one of `allowed`, or None; and the replicas evicted on the way (also with None)."""
    evicted: list[Replica] = []
    high, low = config.high_watermark, config.low_watermark
    if prefer is not None and prefer in allowed:
        offset, victims = prefer.allocate_evicting(length, high, low)
        evicted += victims
        if offset is not None:
            return Place(prefer, offset), evicted
    mine = [record for record in own if record in allowed and record is not prefer]
    others = [record for record in allowed if record is not prefer and record not in mine]
    order = mine + sorted(others, key=lambda record: -record.allocator.free)
    for record in order:
        offset = record.allocate(length, high)
        if offset is not None:
            return Place(record, offset), evicted
    for record in order:
        offset, victims = record.allocate_evicting(length, high, low)
        evicted += victims
        if offset is not None:
            return Place(record, offset), evicted
    return None, evicted
