"""Blocking work in threads behind an async method, for transports that wait in system calls or copy much.

Owns a bounded pool of threads. Before `run` returns or raises, its job no longer uses the caller's buffers: one that is
late or cancelled is told to stop, and then waited for.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from kvcore.clock import SystemClock
from kvcore.errors import PeerUnreachableError, TransferTimeoutError

_Result = TypeVar("_Result")


class BatchDeadline:
    """The end of one batch's time, usable from threads (hence the machine's clock: sockets know no other)."""

    def __init__(self, timeout_s: float) -> None:
        self._clock = SystemClock()
        self._timeout_s = timeout_s
        self._end = self._clock.now() + timeout_s

    def remaining(self) -> float:
        """Seconds left, more than 0. Raises TransferTimeoutError when there are none."""
        left = self._end - self._clock.now()
        if left <= 0:
            raise self.error()
        return left

    def error(self) -> TransferTimeoutError:
        """What a late operation gets."""
        return TransferTimeoutError(f"the batch was not done after {self._timeout_s:g} s")


class BlockingPool:
    """At most `threads` jobs at once; more wait in line, within their deadlines."""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._running: dict[asyncio.Future[Any], Callable[[], None]] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    @property
    def idle(self) -> int:
        """How many jobs more would begin at once, one at least."""
        return max(1, self._threads - len(self._running))

    @property
    def crowded(self) -> bool:
        """Whether jobs wait in line. May be asked from any thread."""
        return len(self._running) > self._threads

    async def run(self, job: Callable[[], _Result], stop: Callable[[], None], deadline: BatchDeadline) -> _Result:
        """The job's result, or what it raises; TransferTimeoutError when it is late.

        `stop` is called from the loop's thread, perhaps more than once, and makes a running job end soon.
        """
        if self._closed:
            raise PeerUnreachableError("the transport is closed")
        timeout_s = deadline.remaining()
        queued = self._pool.submit(job)
        future = asyncio.wrap_future(queued)
        self._running[future] = stop
        try:
            done, _ = await asyncio.wait({future}, timeout=timeout_s)
            if done:
                return future.result()
            await _stopped(queued, future, stop)
            raise deadline.error()
        except asyncio.CancelledError:
            await _stopped(queued, future, stop)
            raise
        finally:
            del self._running[future]

    async def aclose(self) -> None:
        """Stop all jobs, wait for them and end the threads. Idempotent."""
        self._closed = True
        for future, stop in list(self._running.items()):
            stop()
            if not future.done():
                await asyncio.wait({future})
        self._pool.shutdown(wait=True)


async def _stopped(
    queued: concurrent.futures.Future[_Result], future: asyncio.Future[_Result], stop: Callable[[], None]
) -> None:
    """Wait until the job no longer runs. A cancellation meanwhile is raised afterwards, not before."""
    cancelled: asyncio.CancelledError | None = None
    if not queued.cancel():
        stop()
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                cancelled = error
        if not future.cancelled():
            future.exception()  # seen: the caller gets the reason for stopping instead
    if cancelled is not None:
        raise cancelled


async def ended(*threads: threading.Thread) -> None:
    """Wait until all of them have ended, without blocking the loop. Has no deadline of its own."""
    while any(thread.is_alive() for thread in threads):  # noqa: ASYNC110  (threads set no asyncio.Event)
        await asyncio.sleep(0.001)
