"""Work that outlives the call that began it: reports, give-backs, calls whose caller was cancelled.

Invariant: every task ends by its own deadline, and none outlives `aclose`.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Background:
    """Tasks of one store, at most one loop's. The work given must bound itself and must not raise."""

    def __init__(self, max_tasks: int) -> None:
        self._max_tasks = max_tasks
        self._tasks: set[asyncio.Task[object]] = set()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    @property
    def full(self) -> bool:
        """Whether so much is under way that work which may be left out should be; after `aclose` it always is."""
        return self._closed or len(self._tasks) >= self._max_tasks

    def spawn(self, work: Coroutine[object, object, _T]) -> asyncio.Task[_T]:
        """Begin `work`; the task is kept until it ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[object, object, _T], undo: Callable[[_T], Awaitable[None]]) -> _T:
        """The result of `work`. If the caller is cancelled meanwhile, `work` goes on and its result is undone."""
        task = self.spawn(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self.spawn(_undo(task, undo))
            raise

    async def aclose(self, timeout_s: float) -> None:
        """Wait for what is under way, then cancel what has not ended. Idempotent."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _ended(self, task: asyncio.Task[_T]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("background_work_failed", exc_info=error)


async def _undo(task: asyncio.Task[_T], undo: Callable[[_T], Awaitable[None]]) -> None:
    await asyncio.wait([task])
    if not task.cancelled() and task.exception() is None:
        await undo(task.result())
