"""Bounds of every HTTP server of ours. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Times in seconds."""

    max_connections: int | None = None
    """Requests on connections beyond are refused, before the descriptors are used up. None: as many as those allow."""
    head_s: float = 30.0
    """A connection that has sent no whole head of a request by then is closed."""
    close_s: float = 2.0
    """What was cut at the end of a drain has this long to end in order."""
