"""How measurements of nodes are kept and when they are doubted, in one struct that tests may change. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Seconds, shares and counts."""

    keep: float = 0.95
    """What a measurement counts for when the next one has come, …"""
    half_life_s: float = 10.0
    """… and half of that after so long. One that is older and was slower counts for no more than the next one."""
    most: float = 8.0
    """A measurement may be so many times slower than what was expected; more is taken for an accident, unless it
    stays."""
    late: float = 2.0
    """What was given up counts if it took so many times what was expected: else it was merely behind others."""
    least_wait_s: float = 1.0
    """A decoder waits at least so long for a prefiller's KV before it computes, …"""
    patience: float = 2.0
    """… or so many times what the ways should take."""
    most_machines: int = 64
    """To which the rates of one node's writes are remembered, and of its reads from."""
    pair_s: float = 30.0
    """For so long it is believed how fast a node reads from another machine: a link that was slow, and was avoided, is
    tried again."""
    slow_pair: float = 2.0
    """From so many times slower than the fastest reader of the same machine on a link is avoided, …"""
    most_slow: float = 16.0
    """… and counts for no more than so many times."""
    doubt_s: float = 10.0
    """A way that was avoided for so long since what speaks against it was measured, …"""
    doubt_requests: int = 8
    """… by so many requests, is tried again by the next one."""
    ready_share: float = 0.75
    """Of the time for which such a try is waited for: by then the prefiller must be done computing, or what moves is
    not seen."""
