"""Bounds and pauses between a router's processes. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """Times in seconds."""

    ask_s: float = 1.0
    """Another process that has not answered by then is left out."""
    max_load_bytes: int = 1 << 20
    linger_s: float = 5.0
    """A process that leaves answers what comes by its connections for so long, and closes each with its answer; then
    those that are idle are closed."""
    look_s: float = 0.02
    """Between two looks at whether any is left."""
