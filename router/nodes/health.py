"""A circuit breaker a node, pure: consecutive failures of its own legs open it, one probe at a time closes it.

A failure is charged to the part that failed: callers report only what this node itself did wrong.
"""

from dataclasses import dataclass
from enum import StrEnum

from kvcore.errors import (
    DeadlineExceededError,
    EngineError,
    KVFerryError,
    NodeUnavailableError,
)

FAILURES_TO_OPEN = 3
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0


def is_nodes_fault(error: KVFerryError) -> bool:
    """Whether a leg's failure says something about its node's health. A full queue or a bad request does not."""
    return isinstance(error, NodeUnavailableError | EngineError | DeadlineExceededError)


class BreakerState(StrEnum):
    """closed: use it. open: leave it alone. half_open: one leg may try."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class Breaker:
    """Invariant: `_probing` only while half open. Times are the caller's `now`."""

    _failures: int = 0
    _open_until: float | None = None
    _pause_s: float = FIRST_PAUSE_S
    _probing: bool = False

    def state(self, now: float) -> BreakerState:
        """What it is at `now`."""
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until else BreakerState.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether a leg may start; does not reserve the half-open probe."""
        state = self.state(now)
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._probing)

    def started(self, now: float) -> None:
        """A leg starts: while half open it is the probe."""
        self._probing = self.state(now) is BreakerState.HALF_OPEN

    def succeeded(self) -> None:
        """A leg did what it should."""
        self._failures, self._open_until, self._pause_s, self._probing = 0, None, FIRST_PAUSE_S, False

    def failed(self, now: float) -> None:
        """A leg failed by this node's fault. Legs of before, which fail once it is open, do not lengthen the pause."""
        self._failures += 1
        state, probing, self._probing = self.state(now), self._probing, False
        if state is BreakerState.HALF_OPEN and probing:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._open_until = now + self._pause_s
        elif state is BreakerState.CLOSED and self._failures >= FAILURES_TO_OPEN:
            self._open_until = now + self._pause_s

    def undecided(self) -> None:
        """A leg ended without saying anything about the node (cancelled, refused by the request's own fault)."""
        self._probing = False
