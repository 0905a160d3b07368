"""The job that loads chunks from the store into an engine's KV memory.

It serves any engine: it knows keys and bytes only, and the engine says where they go (`Destination`).
A job never fails a request: what cannot be loaded is computed, and counted.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from engines.jobs.context import JobContext
from kvcore.types import ChunkKey
from kvstore.types import GetOutcome, Match, MovedBytes

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
        batch: int | None = None,
    ) -> None:
        """`batch`: chunks of one get at most, where the engine wants another number than the limits'."""
        self._context = context
        self._keys = keys
        self._into = into
        self._first = first
        self._wait_chunks = wait_chunks
        self._deadline = deadline
        self._batch = context.limits.read_chunks if batch is None else batch
        self._may_wait = True
        self._waiting: asyncio.Timeout | None = None
        self.num_loaded = first
        self.moved: list[MovedBytes] = []
        self.wait_s = 0.0
        self.load_s = 0.0

    def __repr__(self) -> str:
        waiting = f", waiting until {self._deadline:.3f}" if self._waiting is not None else ""
        return f"<LoadJob {self.num_loaded - self._first}/{len(self._keys)} chunks from {self._first} on{waiting}>"

    def stop_waiting(self) -> None:
        """Load what is in the store now, then end."""
        self._may_wait = False
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Ends when all is loaded, at the first chunk that is not good, or when nothing more is to be waited for.

        Cancelled, it raises once nothing writes into the memory any more."""
        clock, stop = self._context.clock, self._first + len(self._keys)
        # Each round asks the store for the chunks that are missing and reads those that it has. Whether the round is
        # the last one is decided before the question: `stop_waiting` during it earns one more round, without a wait.
        # 1. The store has some and all of them are good: read on, unless this was the last round.
        # 2. The store has some and one is not good: the chunks behind it are of no use. End.
        # 3. It has none and we may wait: the wait ended early (the metadata server is away). Pause, then ask again.
        # 4. It has none, or not all, in the last round: the rest is absent, and the engine computes it. End.
        while self.num_loaded < stop:
            self._may_wait &= clock.now() < self._deadline and self.num_loaded < self._wait_chunks
            last = not self._may_wait
            match = await self._find(self._keys[self.num_loaded - self._first :], self._deadline - clock.now())
            if match.num_chunks:
                try:
                    good = await self._read(match)
                finally:
                    self._context.store.release_soon(match)
                if not good:
                    return
            elif not last and self._may_wait:
                await asyncio.sleep(min(self._context.limits.retry_s, max(0.0, self._deadline - clock.now())))
            if last:
                self._context.counters["chunk_miss_absent"] += stop - self.num_loaded
                return

    async def _find(self, keys: Sequence[ChunkKey], left_s: float) -> Match:
        """What the store has of `keys`: at once, or, while the job may wait, as soon as it has the first one."""
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
        """Read all matched chunks, batch by batch. False at the first one that is not good."""
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
