"""The bounds of admission, in one struct that tests may change. Operators set what is in RouterConfig. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Seconds, shares and counts."""

    ahead_s: float = 0.02
    """A node that has no more than this to compute takes another request: it must not be idle while the next one is on
    its way. All beyond it waits here, where turns can still be taken fairly."""
    least_look_s: float = 0.001
    """Between two looks at whether a node is nearly done, by time alone."""
    preparing: float = 0.25
    """Of a decoder's places: so many more sequences may be on their way to it while all are taken."""
    margin: float = 0.9
    """Of the time there is for a first token: a request that is expected later than this is refused when it comes."""
    patience: float = 2.0
    """A prompt that takes long by itself has so many times its own time, however short the configured limit is."""
    output_weight: float = 2.0
    """A token of an answer counts as much as so many of a prompt where shares are compared (VTC, OSDI 2024)."""
    saved: float = 8.0
    """Requests of the usual cost: what a client that asks for less than its share saves up, for its bursts."""
    waiting_tokens: int = 1 << 21
    """Of the prompts of requests that wait for a turn, all together, or that wait while no node is up: some 80 MB."""
    tell_s: float = 1.0
    """Between two words to a client that waits so."""
    unknown_output: float = 256.0
    """Tokens that an answer may have, where none was given yet."""
    told_lasts_s: float = 1.5
    """What another router said of its load counts for so long."""
    share_s: float = 0.25
    """Between two times that the others are told of this router's load; while somebody waits, here or there, at each
    change, but for …"""
    busy_share_s: float = 0.002
    """… so long between two times, for each of them."""
    yield_s: float = 0.5
    """A request at another router that is first in turn is waited for so long: it may wait for something else."""
    told_flows: int = 200
    """That a router tells of, those that were charged last."""
    max_routers: int = 64
    max_flows: int = 10_000
    """Of which past use is remembered; that of the one that was idle for longest is forgotten."""
