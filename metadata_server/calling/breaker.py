"""How long a caller waits for a metadata server, and when it does not ask at all: a server that hangs is as cheap as a
dead one. Pure but for the long polls that it ends.

Owns what was learnt of the server's pace, and the pause after a failure. Calls that a request waits for have a limit of
their own, learnt and much shorter than that of the others.
"""

import asyncio
from collections.abc import Awaitable

from kvcore.errors import MetadataUnavailableError
from metadata_server import endpoints
from metadata_server.limits import ClientLimits

QUICK = frozenset(
    endpoint.path
    for endpoint in (
        endpoints.MATCH,
        endpoints.WAIT,
        endpoints.RESERVE,
        endpoints.COMMIT,
        endpoints.ABORT,
        endpoints.RELEASE,
        endpoints.RENEW,
        endpoints.FIND_HOLDERS,
        endpoints.QUARANTINE,
    )
)
"""Paths of the calls that a request may wait for."""


class PollEndedError(MetadataUnavailableError):
    """A long poll was given up because another call was late: it says nothing new."""


class CallBreaker:
    """Of one client. Times are the caller's `now`; `timeout_s`: the longest that a call may take.

    After a failure every call fails at once for a pause that grows, and then one call at a time probes: a server that
    is dead, or hangs, costs one caller its limit, not all. Where it hangs, calls that a request waits for are left out
    for longer than others, and a long poll under way ends with the first call that is late.
    """

    def __init__(self, timeout_s: float, limits: ClientLimits) -> None:
        self._timeout_s, self._limits = timeout_s, limits
        self._pause_s = 0.0
        self._closed_until = self._quick_until = 0.0
        self._slow_s = 0.0
        self._answers = 0
        self._polls: set[asyncio.Timeout] = set()

    def is_open(self, now: float) -> bool:
        """Whether a call that a request waits for would fail at once."""
        return self._pause_s > 0.0 and now < max(self._closed_until, self._quick_until)

    def left_s(self, now: float) -> float:
        """Until a call is tried again."""
        return max(self._closed_until, self._quick_until) - now

    def limit_s(self, path: str, num_bytes: int, timeout_s: float | None) -> float:
        """How long this call may take, with a body of so many bytes. `timeout_s`: as its caller has it."""
        longest_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        limits = self._limits
        if path not in QUICK:
            return longest_s
        known = self._answers >= limits.known_answers
        usual_s = limits.quick_factor * self._slow_s if known else limits.unknown_share * self._timeout_s
        return min(longest_s, max(limits.quick_s, usual_s + limits.quick_byte_s * num_bytes))

    def enter(self, path: str, now: float, limit_s: float) -> bool:
        """Whether this call probes a server that failed last. Raises MetadataUnavailableError during the pause."""
        # Three cases:
        # 1. the last call was answered: go on;
        # 2. it failed, and the pause (or another call's probe) is not over: fail;
        # 3. it failed and the pause is over: probe, and hold the others up for as long as that may take.
        if self._pause_s == 0.0:
            return False
        if now < self._closed_until or (path in QUICK and now < self._quick_until):
            raise MetadataUnavailableError("metadata server failed a moment ago; not tried again yet")
        self._closed_until = now + min(limit_s, self._timeout_s)  # a long poll that probes must not hold up the others
        return True

    def answered(self, path: str, seconds: float | None) -> None:
        """A call was answered. `seconds`: that it took; None: it says nothing of the server's pace."""
        self._pause_s = 0.0
        if seconds is not None and path in QUICK:
            self._answers += 1
            self._slow_s = max(seconds, self._limits.pace_decay * self._slow_s)

    def failed(self, error: MetadataUnavailableError, now: float, limit_s: float, seconds: float) -> None:
        """A call got no answer: it had `limit_s`, and failed after `seconds`."""
        if isinstance(error, PollEndedError):
            return
        limits = self._limits
        self._pause_s = min(limits.longest_pause_s, self._pause_s * 2 or limits.first_pause_s)
        if seconds >= limit_s:  # it hangs: those who find that out again shall be few
            self._quick_until = now + min(limits.longest_late_pause_s, limits.late_factor * limit_s)
            for poll in self._polls:
                poll.reschedule(0.0)
        self._closed_until = now + self._pause_s

    def cancelled(self, now: float, probing: bool) -> None:
        """A call was given up by its caller. If it probed, nothing was learnt, and the next one may."""
        if probing:
            self._closed_until = self._quick_until = now

    async def poll(self, call: Awaitable[bytes]) -> bytes:
        """A long poll, which ends once another call is late: its server answers nobody."""
        try:
            async with asyncio.timeout(None) as poll:
                self._polls.add(poll)
                try:
                    return await call
                finally:
                    self._polls.discard(poll)
        except TimeoutError as error:
            raise PollEndedError("the metadata server answers nobody, so a wait was given up") from error
