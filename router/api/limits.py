"""The bounds of what clients may ask, and of how long they may take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiLimits:
    """Bounds of the HTTP surface."""

    max_n: int = 128
    max_prompts: int = 128
    max_stops: int = 16
    max_stop_chars: int = 1000
    max_logprobs: int = 20
    max_salt_chars: int = 1024
    """Of `cache_salt`, as vLLM's. An empty one is refused: it would share what its tenant wants apart."""
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    """A client that takes nothing for so long is gone: it would hold its place on a node until the request's time is
    up."""
