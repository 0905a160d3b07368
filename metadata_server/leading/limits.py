"""Pauses and shares of the election. How long a leader's lease is, is in the cluster file."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ElectionLimits:
    """Shares are of the lease."""

    renew_share: float = 0.25
    """Between two renewals of a leader."""
    poll_share: float = 0.125
    """Between two looks of a follower, and between two tries of a leader whose renewal failed."""
    trusted_share: float = 0.85
    """For so much of its lease, from the moment at which it asked for it, a leader takes itself for one: clocks of two
    machines may run at different speeds."""
