"""Bounds of a look at what is orphaned. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JanitorLimits:
    """The rest is found by the next look."""

    most_listed: int = 1000
    """Of each kind, in one answer."""
