"""The jobs that move chunks between an engine's KV memory and the store. Any engine's: they know keys and bytes only.

A job never fails a request: what cannot be loaded is computed, what cannot be saved is left out, both are counted.
The engine says where the bytes are (`Destination`, `Offer`) and holds that memory until a job lets go of it.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from engines.base import Moved
from kvcore.clock import Clock
from kvcore.types import ChunkKey
from kvstore.put_session import PutSession
from kvstore.store import KVStore
from kvstore.types import GetOutcome, Match, MovedBytes

_READ_BATCH = 8
"""Chunks of one get at most: loaded chunks count as soon as their batch is in."""
_RETRY_S = 0.05
"""Pause after a wait that ended at once with nothing: the metadata server is away."""
_RESERVE_AGAIN_S = 20.0
"""A reservation that is no longer good may have run out, if its session is older than this: ask once more."""
_CANCEL_S = 2.0
"""A write that was cancelled lets go of its memory within this, else it is left behind; it is never committed."""


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


@dataclass(eq=False, frozen=True, slots=True)
class Offer:
    """A full chunk that lies in the engine's memory."""

    key: ChunkKey
    num_tokens: int
    reading: Callable[[], AbstractAsyncContextManager[Sequence[memoryview]]]
    """Its payload; the bytes stay as they are inside of the context."""
    let_go: Callable[[], None] = field(default=lambda: None)
    """Called once: the job does not need the memory any more."""


class SaveJob:
    """Writes the chunks of one request into the store, in the order they are offered, and commits them in batches.

    `reserve`: room for these is asked for in one batch at the start, before they are computed; others get theirs batch
    by batch. `sizes`: payload bytes of short chunks, may grow before they are offered. `parallel`: writes at a time.
    `void`: once it says so, from whatever thread, nothing more is committed. `stored`: keys known to be complete.
    """

    def __init__(
        self,
        context: JobContext,
        prefer_segment: str | None,
        reserve: Sequence[ChunkKey],
        *,
        sizes: Mapping[ChunkKey, int] | None = None,
        parallel: int = 1,
        void: Callable[[], bool] = lambda: False,
    ) -> None:
        self._context = context
        self._prefer_segment = prefer_segment
        self._reserve = list(reserve)
        self._sizes = {} if sizes is None else sizes
        self._void = void
        self._gate = asyncio.Semaphore(parallel)
        self._offers: deque[Offer] = deque()
        self._held: set[Offer] = set()
        self._writing: dict[Offer, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._closed = False
        self._session: PutSession | None = None
        self._covered: set[ChunkKey] = set()
        self._reserved_at = 0.0
        self.stored: set[ChunkKey] = set()
        self.moved: list[MovedBytes] = []
        self.save_s = 0.0

    @property
    def num_pending(self) -> int:
        """Chunks that were offered and not let go of yet."""
        return len(self._held)

    def add(self, offer: Offer) -> None:
        """One more offer. Its memory is held until it is written or declined. Let go of at once after `close`."""
        if self._closed:
            offer.let_go()
            return
        self._offers.append(offer)
        self._held.add(offer)
        self._wake.set()

    def close(self) -> None:
        """Nothing more will be offered: `run` ends after what was."""
        self._closed = True
        self._wake.set()

    async def run(self) -> None:
        """Ends when closed and all is committed or declined. Memory and reservations are given back in any case."""
        try:
            if self._reserve:
                await self._begin(self._reserve)
            while batch := await self._next_batch():
                began = self._context.clock.now()
                await self._save(batch)
                self.save_s += self._context.clock.now() - began
        finally:
            self.abandon()
            await self._end_session()

    def abandon(self) -> None:
        """Let go of what was offered and is not being written. `run` does it too, but a task may be cancelled before it
        runs."""
        self.close()
        self._offers.clear()
        for offer in self._held - self._writing.keys():
            self._let_go(offer)

    async def cut(self, timeout_s: float) -> None:
        """The memory is about to be given to others. What is not being written is let go of; writes under way may end
        within `timeout_s`, then they are cancelled. What was written in whole is committed after this, by `run`."""
        self.abandon()
        if self._writing:
            await asyncio.wait(self._writing.values(), timeout=timeout_s)
        if late := list(self._writing.values()):
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=_CANCEL_S)

    async def _next_batch(self) -> list[Offer]:
        while not self._offers and not self._closed:
            self._wake.clear()
            await self._wake.wait()
        batch = list(self._offers)
        self._offers.clear()
        return batch

    async def _save(self, batch: Sequence[Offer]) -> None:
        session = await self._session_for([offer.key for offer in batch])
        async with asyncio.TaskGroup() as group:
            for offer in batch:
                group.create_task(self._write(session, offer))
        if not self._void():
            committed = await session.commit(timeout_s=self._context.timeout_s)
            self.stored.update(committed)
            self._context.counters["chunks_stored"] += len(committed)

    async def _session_for(self, keys: list[ChunkKey]) -> PutSession:
        session = self._session
        fresh = session is None or session.stale or not self._covered.issuperset(keys)
        if session is not None and self._context.clock.now() - self._reserved_at > _RESERVE_AGAIN_S:
            fresh |= not all(session.wants(key) or key in self.stored for key in keys)
        if not fresh:
            assert session is not None
            return session
        at = self._reserve.index(keys[-1]) + 1 if keys[-1] in self._reserve else len(self._reserve)
        return await self._begin(keys + self._reserve[at:])

    async def _write(self, session: PutSession, offer: Offer) -> None:
        async with self._gate:
            if offer not in self._held:  # cut meanwhile
                return
            task = asyncio.current_task()
            assert task is not None
            self._writing[offer] = task
            try:
                if session.wants(offer.key):
                    async with offer.reading() as payload:
                        written = await session.write(
                            offer.key, offer.num_tokens, payload, timeout_s=self._context.timeout_s
                        )
                    self._context.counters["save_failed"] += not written
                elif offer.key not in self.stored:
                    self._context.counters["save_declined"] += 1
            finally:
                del self._writing[offer]
                self._let_go(offer)

    async def _begin(self, keys: Sequence[ChunkKey]) -> PutSession:
        await self._end_session()
        keys = list(dict.fromkeys(keys))
        self._session = session = await self._context.store.begin_put(
            keys, prefer_segment=self._prefer_segment, timeout_s=self._context.timeout_s, sizes=self._sizes
        )
        self._covered, self._reserved_at = set(keys), self._context.clock.now()
        self.stored |= session.complete
        return session

    async def _end_session(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            self.moved += session.moved
            await session.aclose()

    def _let_go(self, offer: Offer) -> None:
        self._held.discard(offer)
        offer.let_go()
