"""The timers of all requests, by one timer of the event loop: one of its own is 4 µs to set and to cancel, and nearly
every one is cancelled.

Owns when what is due is told. Nobody is told early, nor more than a step late by its fault.
"""

import asyncio
import heapq
import math
from typing import Protocol

import msgspec

from router.requests.events import RequestEvent


class _Timed(Protocol):
    def tell(self, event: RequestEvent) -> object:
        """It happened."""
        ...


class RunningTimer(msgspec.Struct, eq=False):
    """`step`: at the end of which its request is told."""

    request: _Timed
    event: RequestEvent
    step: int


class RequestTimers:
    """Of one router, on one loop."""

    def __init__(self, step_s: float = 0.02) -> None:
        self._step_s = step_s
        self._due: dict[int, dict[RunningTimer, None] | None] = {}
        """By step, in the order in which they were set. None: all were cancelled, and the step is not over."""
        self._steps: list[int] = []
        """Those of `_due`, as a heap."""
        self._handle: asyncio.TimerHandle | None = None
        self._looks_at: float = math.inf
        """The step at whose end the loop's timer fires; inf: there is none."""

    def __repr__(self) -> str:
        return f"<RequestTimers {sum(len(those or ()) for those in self._due.values())} run>"

    def start(self, request: _Timed, event: RequestEvent, after_s: float) -> RunningTimer:
        """Tell the request of the event in so many seconds."""
        loop = asyncio.get_running_loop()
        step = math.ceil((loop.time() + after_s) / self._step_s)
        timer = RunningTimer(request, event, step)
        if those := self._due.get(step):
            those[timer] = None
            return timer
        if step not in self._due:
            heapq.heappush(self._steps, step)
            if step < self._looks_at:
                self._look_at(step, loop)
        self._due[step] = {timer: None}
        return timer

    def cancel(self, timer: RunningTimer) -> None:
        """Nothing comes of it, unless it was told already. The loop's timer is left as it is: it finds nothing."""
        if those := self._due.get(timer.step):
            those.pop(timer, None)
            if not those:
                self._due[timer.step] = None

    def _look_at(self, step: int, loop: asyncio.AbstractEventLoop) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._looks_at, self._handle = step, loop.call_at(step * self._step_s, self._look)

    def _look(self) -> None:
        # Who is told may start timers and cancel them, of a step that is over too, and may have a bug: that one's
        # traceback is the loop's to show, and what else is due is told next.
        loop = asyncio.get_running_loop()
        over = max(self._looks_at, math.floor(loop.time() / self._step_s))  # the loop may be a rounding early
        self._handle, self._looks_at = None, -math.inf
        try:
            while self._steps and self._steps[0] <= over:
                while those := self._due[self._steps[0]]:
                    timer = next(iter(those))
                    self.cancel(timer)
                    timer.request.tell(timer.event)
                del self._due[heapq.heappop(self._steps)]
        finally:
            self._looks_at = math.inf
            if self._steps:
                self._look_at(self._steps[0], loop)
