"""The job that loads chunks from the store into an engine's KV memory, and what all jobs share (see `save_job`).

Any engine's: a job knows keys and bytes only, and the engine says where they go (`Destination`).
A job never fails a request: what cannot be loaded is computed, and counted.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.types import ChunkKey
from kvstore.store import KVStore
from kvstore.types import GetOutcome, Match, MovedBytes
from nodeapi.messages import Moved

_READ_BATCH = 8
"""Chunks of one get at most: loaded chunks count as soon as their batch is in."""
_RETRY_S = 0.05
"""Pause after a wait that ended at once with nothing: the metadata server is away."""


def as_moved(moves: Sequence[MovedBytes]) -> list[Moved]:
    """One entry a (transport, direction)."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for move in moves:
        size, seconds = sums.get((move.transport, move.direction), (0, 0.0))
        sums[move.transport, move.direction] = (size + move.num_bytes, seconds + move.seconds)
    return [
        Moved(transport=transport, direction=str(direction), num_bytes=size, seconds=seconds)
        for (transport, direction), (size, seconds) in sums.items()
    ]


@dataclass(frozen=True, slots=True)
class JobContext:
    """What the jobs of one engine share."""

    store: KVStore
    clock: Clock
    counters: Counter[str]
    timeout_s: float
    """For one call of the store."""


Destination = Callable[[int, int], AbstractAsyncContextManager[Sequence[Sequence[memoryview]]]]
"""`(first, count)`, indices into a job's keys: memory for those chunks' payloads. Once the context is left without an
error their bytes are where the engine looks for them."""


class LoadJob:
    """Reads consecutive chunks into an engine's memory, as they appear if somebody is computing them.

    `first`: index of `keys[0]` among the request's chunks. Chunks before `wait_chunks` (likewise counted) are waited
    for until `deadline` (Clock.now). `num_loaded`: that many leading chunks of the request are good. It grows batch by
    batch and holds after a cancellation too.
    """

    def __init__(
        self,
        context: JobContext,
        keys: Sequence[ChunkKey],
        into: Destination,
        *,
        first: int = 0,
        wait_chunks: int = 0,
        deadline: float = 0.0,
        batch: int = _READ_BATCH,
    ) -> None:
        self._context = context
        self._keys = keys
        self._into = into
        self._first = first
        self._wait_chunks = wait_chunks
        self._deadline = deadline
        self._batch = batch
        self._may_wait = True
        self._waiting: asyncio.Timeout | None = None
        self.num_loaded = first
        self.moved: list[MovedBytes] = []
        self.wait_s = 0.0
        self.load_s = 0.0

    def stop_waiting(self) -> None:
        """Take what is in the store now, then end."""
        self._may_wait = False
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Ends when all is loaded, at the first chunk that is not good, or when nothing more is to be waited for.

        Cancelled, it raises once nothing writes into the memory any more."""
        clock, stop = self._context.clock, self._first + len(self._keys)
        while self.num_loaded < stop:
            self._may_wait &= clock.now() < self._deadline and self.num_loaded < self._wait_chunks
            final = not self._may_wait
            match = await self._find(self._keys[self.num_loaded - self._first :], self._deadline - clock.now())
            if match.num_chunks:
                try:
                    good = await self._read(match)
                finally:
                    self._context.store.release_soon(match)
                if not good:
                    return
            elif not final and self._may_wait:
                await asyncio.sleep(min(_RETRY_S, max(0.0, self._deadline - clock.now())))
            if final:
                self._context.counters["chunk_miss_absent"] += stop - self.num_loaded
                return

    async def _find(self, keys: Sequence[ChunkKey], left_s: float) -> Match:
        store, timeout_s = self._context.store, self._context.timeout_s
        if not self._may_wait:
            return await store.match(keys, timeout_s=timeout_s)
        started = self._context.clock.now()
        try:
            async with asyncio.timeout(left_s + timeout_s) as self._waiting:
                return await store.wait(keys, more_than=0, timeout_s=left_s)
        except TimeoutError:
            return Match()
        finally:
            self._waiting = None
            self.wait_s += self._context.clock.now() - started

    async def _read(self, match: Match) -> bool:
        for start in range(0, match.num_chunks, self._batch):
            count = min(self._batch, match.num_chunks - start)
            began = self._context.clock.now()
            async with self._into(self.num_loaded - self._first, count) as buffers:
                result = await self._context.store.get_into(match, start, buffers, timeout_s=self._context.timeout_s)
            self.load_s += self._context.clock.now() - began
            self.moved += result.moved
            for outcome in result.outcomes:
                if outcome is not GetOutcome.OK:
                    self._context.counters[f"chunk_miss_{outcome}"] += 1
                    return False
                self.num_loaded += 1
                self._context.counters["chunks_loaded"] += 1
        return True
