"""The time in which segments tell how long a replica was not used: calls of the state. A value."""

from dataclasses import dataclass


@dataclass(slots=True)
class CallCount:
    """Calls of the state so far."""

    so_far: int = 0
    now: float = 0.0
    """Of the last call."""
    same_use_s: float = 0.0
    """Uses so soon after one that was counted are the same use: who stores a chunk hands it over to who reads it."""
