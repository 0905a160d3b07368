"""Bounds of the metadata server's state."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """What MetadataState holds at most, and for how long."""

    max_read_leases: int = 65_536
    max_replaced: int = 64
    """Earlier incarnations of a live node that are known, so that their late messages are refused."""
