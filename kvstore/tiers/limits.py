"""Bounds and pauses around a tier that are no matter of a cluster file. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierLimits:
    """Of one tier, in one process."""

    failures: int = 3
    """Calls in a row that find the tier unavailable before it is left alone for a while."""
    pause_s: float = 0.5
    """The first time that it is left alone; then twice as long each time, ..."""
    longest_pause_s: float = 3.0
    """... up to this: soon after its return a tier is in use again."""
    rate_weight: float = 0.2
    """Of the last call, in the running estimate of bytes a second."""
