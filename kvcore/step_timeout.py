"""A time limit for each of many short steps of one task, kept by one timer.

`asyncio.timeout` around each step makes a timer and cancels it again: about 5 us, twice a token. Here a step only notes
its deadline. The timer looks at it when it fires, and is set again if a later step has moved the deadline meanwhile.
"""

import asyncio
import math
from types import TracebackType
from typing import Self


class StepTimeout:
    """`async with` it around the steps, on one task; `start(seconds)` and `stop()` around each.

    A step that takes longer is cancelled, and the block then raises TimeoutError, as that of `asyncio.timeout` does.
    Between steps nothing is limited.
    """

    def __init__(self) -> None:
        self._limit = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        left = f"{self._deadline - self._loop.time():.3f} s left" if self._deadline < math.inf else "between steps"
        return f"<StepTimeout {left}>"

    def start(self, seconds: float) -> None:
        """A step begins, which may take `seconds`."""
        self._deadline = self._loop.time() + seconds
        if self._timer is not None and self._timer.when() > self._deadline:  # set for a step that was allowed more
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._fired)

    def stop(self) -> None:
        """The step has ended in time. The timer is left as it is: the next step needs one."""
        self._deadline = math.inf

    def expire(self) -> None:
        """End the block now, as if a step had taken too long; nothing if it ends already. Inside the block alone."""
        if not self._limit.expired():
            self._limit.reschedule(self._loop.time())

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises TimeoutError if it was a step's limit that ended the block."""
        if self._timer is not None:
            self._timer.cancel()
        await self._limit.__aexit__(kind, error, trace)

    def _fired(self) -> None:
        # 1. No step is under way: the next one sets the timer again.
        # 2. A later step is under way, whose time is not up: set the timer for it.
        # 3. The step's time is up: the task is cancelled.
        self._timer = None
        if self._deadline == math.inf:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._fired)
        else:
            self.expire()
