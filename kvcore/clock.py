"""The injected clock. Nothing outside this module reads the time of the machine to decide anything."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time. Durations come from `now`, never from `wall`."""

    def now(self) -> float:
        """Seconds on a clock that never goes back; its zero means nothing."""
        ...

    def wall(self) -> float:
        """Unix time in seconds, for people and for identifiers that must grow across restarts."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> float:
        """`time.monotonic()`."""
        return time.monotonic()

    def wall(self) -> float:
        """`time.time()`."""
        return time.time()


class WakefulClock(SystemClock):
    """One whose `now` goes on while the machine sleeps: for leases that others count on."""

    def now(self) -> float:
        """Linux's CLOCK_BOOTTIME."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


class ManualClock:
    """A clock that a test moves by hand."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now

    def now(self) -> float:
        """The time last set."""
        return self._now

    def wall(self) -> float:
        """The same as `now`: a test has one time."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move on by `seconds`, which is not negative."""
        assert seconds >= 0, "time does not go back"
        self._now += seconds
