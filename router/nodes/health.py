"""A circuit breaker a node, pure: consecutive failures of its own legs open it, one probe at a time closes it.

A failure is charged to the part that failed: callers report only what this node itself did wrong. What leads to what
(tests hold this table to BREAKER_TRANSITIONS, and a breaker to both):

    closed     failed     closed open
    closed     succeeded  closed
    closed     time       closed
    open       failed     open
    open       succeeded  closed
    open       time       open half_open
    half_open  failed     half_open open
    half_open  succeeded  closed
    half_open  time       half_open

    failed     closed opens with the last of some failures in a row; half open opens, for twice as long, by its one try
               alone: legs that began before it opened may still fail, and say nothing new
    time       an open one becomes half open when its pause is over
"""

from dataclasses import dataclass
from enum import StrEnum

from kvcore.errors import (
    DeadlineExceededError,
    EngineError,
    KVFerryError,
    NodeUnavailableError,
)
from router.nodes.limits import NodeHealthLimits


def is_nodes_fault(error: KVFerryError) -> bool:
    """Whether a leg's failure says something about its node's health. A full queue or a bad request does not."""
    return isinstance(error, NodeUnavailableError | EngineError | DeadlineExceededError)


class BreakerState(StrEnum):
    """closed: use it. open: leave it alone. half_open: one leg may try."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


_S = BreakerState
BREAKER_TRANSITIONS: dict[tuple[BreakerState, str], set[BreakerState]] = {
    (_S.CLOSED, "failed"): {_S.CLOSED, _S.OPEN},
    (_S.CLOSED, "succeeded"): {_S.CLOSED},
    (_S.CLOSED, "time"): {_S.CLOSED},
    (_S.OPEN, "failed"): {_S.OPEN},
    (_S.OPEN, "succeeded"): {_S.CLOSED},
    (_S.OPEN, "time"): {_S.OPEN, _S.HALF_OPEN},
    (_S.HALF_OPEN, "failed"): {_S.HALF_OPEN, _S.OPEN},
    (_S.HALF_OPEN, "succeeded"): {_S.CLOSED},
    (_S.HALF_OPEN, "time"): {_S.HALF_OPEN},
}


@dataclass(slots=True)
class Breaker:
    """Invariant: `_trying` only while half open. Times are the caller's `now`."""

    limits: NodeHealthLimits = NodeHealthLimits()
    open_until: float | None = None
    """None: closed. Else the end of the pause."""
    _failures: int = 0
    _pause_s: float | None = None
    """Of the last time that it opened since it was closed."""
    _trying: bool = False

    def state(self, now: float) -> BreakerState:
        """What it is at `now`."""
        if self.open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self.open_until else BreakerState.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether a leg may start; does not reserve the half-open probe."""
        state = self.state(now)
        return state is BreakerState.CLOSED or (state is BreakerState.HALF_OPEN and not self._trying)

    def started(self, now: float) -> None:
        """A leg starts: while half open it is the probe."""
        self._trying = self.open_until is not None and self.state(now) is BreakerState.HALF_OPEN

    def succeeded(self) -> None:
        """A leg did what it should."""
        self._failures, self.open_until, self._pause_s, self._trying = 0, None, None, False

    def failed(self, now: float) -> None:
        """A leg failed by this node's fault. Legs of before, which fail once it is open, do not lengthen the pause."""
        self._failures += 1
        state, trying, self._trying = self.state(now), self._trying, False
        if state is BreakerState.HALF_OPEN and trying:
            self._open(now, min(2 * (self._pause_s or 0.0), self.limits.longest_pause_s))
        elif state is BreakerState.CLOSED and self._failures >= self.limits.failures_to_open:
            self._open(now, self.limits.first_pause_s)
        assert self.state(now) in BREAKER_TRANSITIONS[state, "failed"]

    def undecided(self) -> None:
        """A leg ended without saying anything about the node (cancelled, refused by the request's own fault)."""
        self._trying = False

    def _open(self, now: float, pause_s: float) -> None:
        self._pause_s, self.open_until = pause_s, now + pause_s
