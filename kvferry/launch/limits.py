"""Bounds and pauses of the launcher. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LaunchLimits:
    """Times in seconds."""

    health_timeout_s: float = 2.0
    poll_s: float = 0.1
    """Between two questions to a process that is not healthy yet."""
    watch_s: float = 1.0
    """Between two questions to one of several processes on one port, once it serves."""
    most_silent: int = 5
    """Questions in a row that may have no answer within `health_timeout_s`: then it hangs."""
    first_backoff_s: float = 0.2
    longest_backoff_s: float = 5.0
    steady_s: float = 10.0
    """A process that ran for less than this is started again ever more slowly, even if it was ready."""
    max_order_bytes: int = 1 << 16
    """Of one order over the launcher's socket."""
    kill_margin_s: float = 15.0
    """Beyond the time for draining. A node needs it to end its engine: vLLM takes five seconds and more."""
