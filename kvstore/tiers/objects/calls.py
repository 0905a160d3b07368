"""Blocking calls that nobody can stop, in threads, behind an async method that ends in time all the same.

Owns a bounded pool of threads. A call that is late goes on without us, until its library's own time limit ends it; the
caller's memory it can touch no more.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from transfer.memory.copying import copy

_Result = TypeVar("_Result")
_PIECE_BYTES = 1 << 20


class Grip:
    """The hold of one batch of calls on the caller's memory. The loop takes it away, and waits for a piece at most."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = True

    def release(self) -> None:
        """From now on nothing is copied. Waits for the piece that is being copied."""
        with self._lock:
            self._held = False

    def gather(self, views: Sequence[memoryview], target: memoryview) -> bool:
        """Copy the caller's `views`, one after the other, into `target`. False: it was released, not all is copied."""
        return all(self._copy(part, piece) for piece, part in _pieces(views, target))

    def scatter(self, source: memoryview, views: Sequence[memoryview]) -> bool:
        """Copy `source` over the caller's `views`, likewise."""
        return all(self._copy(piece, part) for piece, part in _pieces(views, source))

    def _copy(self, target: memoryview, source: memoryview) -> bool:
        with self._lock:
            if self._held:
                copy(target, source)
            return self._held


def _pieces(views: Sequence[memoryview], flat: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
    at = 0
    for view in views:
        whole = view.cast("B")
        for start in range(0, whole.nbytes, _PIECE_BYTES):
            piece = whole[start : start + _PIECE_BYTES]
            yield piece, flat[at : at + piece.nbytes]
            at += piece.nbytes


class CallPool:
    """At most `threads` calls at once; more wait in line, within their time."""

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._closed = name, False
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._waiting: dict[asyncio.Future[Any], Grip] = {}

    def __repr__(self) -> str:
        return f"<CallPool {self._name}, {len(self._calls)} calls, {len(self._waiting)} of them waited for>"

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    async def run(self, calls: Sequence[Callable[[Grip], _Result]], timeout_s: float) -> list[_Result | None]:
        """What each returned; None for one that was not done in time, or when the pool was closed. They raise nothing
        that is expected. When this returns or raises they have let go of the caller's memory."""
        if self._closed or timeout_s <= 0 or not calls:
            return [None] * len(calls)
        grip, futures = Grip(), list[asyncio.Future[_Result]]()
        for call in calls:
            queued = self._pool.submit(call, grip)
            self._calls.add(queued)
            queued.add_done_callback(self._calls.discard)
            future = asyncio.wrap_future(queued)
            self._waiting[future] = grip
            futures.append(future)
        try:
            await asyncio.wait(futures, timeout=timeout_s)
            return [future.result() if future.done() and not future.cancelled() else None for future in futures]
        finally:
            grip.release()
            for future in futures:
                future.cancel()  # one that waits in line is never begun
                del self._waiting[future]

    async def aclose(self, timeout_s: float) -> None:
        """End all waiting at once, then wait `timeout_s` at most for the calls themselves. Idempotent."""
        self._closed = True
        for future, grip in self._waiting.items():
            grip.release()
            future.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if left := [asyncio.wrap_future(call) for call in self._calls]:
            await asyncio.wait(left, timeout=timeout_s)
