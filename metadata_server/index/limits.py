"""Bounds of the metadata server's state."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """What MetadataState holds at most, and for how long."""

    max_read_leases: int = 65_536
    tombstone_ttls: int = 12
    """The last incarnation of a node that has gone is known for so many of its longest leases."""
