"""A node's own tasks: that fail aloud, that may be paused, and that are ended."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from kvcore.telemetry import log_fields

_logger = logging.getLogger("kvnode")
_Result = TypeVar("_Result")


class PausableWork(Generic[_Result]):
    """Work of which nothing is under way while it is paused or closed. Results are not None."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[_Result]] = set()
        self._pauses = 0

    def __len__(self) -> int:
        """How much is under way."""
        return len(self._running)

    @property
    def is_paused(self) -> bool:
        """Whether nothing may begin now."""
        return self._pauses > 0

    async def run(self, work: Coroutine[object, object, _Result]) -> _Result | None:
        """Its result; None if a pause ended it, or let it not begin. The caller's cancellation ends it first."""
        if self.is_paused:
            work.close()
            return None
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                task.cancel()
                await asyncio.wait({task})
                raise
            return None

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """What is under way is cancelled and has ended when it is entered, and nothing begins until it is left."""
        self._pauses += 1
        try:
            await self._stop()
            yield
        finally:
            self._pauses -= 1

    async def aclose(self) -> None:
        """As a pause that never ends. Idempotent."""
        self._pauses += 1
        await self._stop()

    async def _stop(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)


def spawned(work: Coroutine[object, object, None], name: str) -> "asyncio.Task[None]":
    """A task that runs until it is cancelled. If it fails the loop's exception handler is told at once: else nobody
    would know before the node stops."""
    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(_tell_failure)
    return task


def _tell_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        message = f"the node's task {task.get_name()} failed; what it did is not done until the node is started again"
        task.get_loop().call_exception_handler({"message": message, "exception": error, "task": task})


async def cancelled(*tasks: "asyncio.Task[None]") -> None:
    """Cancel them, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        log_fields(_logger, logging.DEBUG, "task_ended", name=task.get_name())
