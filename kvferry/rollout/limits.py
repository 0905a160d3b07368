"""Bounds and pauses of a rollout. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RolloutLimits:
    """Times in seconds. `drain_s`: what runs on a node has so long to end there. `start_s`: a process that was started
    anew has so long to serve."""

    drain_s: float
    start_s: float
    poll_s: float = 0.5
    launcher_s: float = 1200.0
    """For one order to the launcher, which waits for the end of the process of before."""
    trial_s: float = 60.0
    """For the one token that a node is asked for before it is used again ..."""
    trials: int = 3
    """... and how often it may fail."""
