"""The job that saves chunks from an engine's KV memory into the store.

Any engine's: it knows keys and bytes only. The engine says where they are (`Offer`) and holds that memory until the job
lets go of it. A job never fails a request: what cannot be saved is left out, and counted.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from engines.jobs.load import JobContext
from kvcore.types import ChunkKey
from kvstore.put_session import PutSession
from kvstore.types import MovedBytes

_RESERVE_AGAIN_S = 20.0
"""A reservation that is no longer good may have run out, if its session is older than this: ask once more."""
_COMMIT_CHUNKS = 4
"""Chunks are committed as soon as so many are written, and read by others while the next ones are."""
_CANCEL_S = 2.0
"""A write that was cancelled lets go of its memory within this, else it is left behind; it is never committed."""


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
    """Writes the chunks of one request into the store, in the order they are offered, and commits them in batches, each
    while the next one is written.

    `reserve`: room for these is asked for in one batch at the start, before they are computed; others get theirs batch
    by batch. `sizes`: payload bytes of short chunks, may grow before they are offered. `parallel`: writes at a time.
    `void`: once it says so, from whatever thread, nothing more is committed. `committed`: called when all that was
    offered so far is.
    `stored`: keys known to be complete.
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
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        self._context = context
        self._prefer_segment = prefer_segment
        self._reserve = list(reserve)
        self._sizes = {} if sizes is None else sizes
        self._void = void
        self._committed = committed
        self._gate = asyncio.Semaphore(parallel)
        self._offers: deque[Offer] = deque()
        self._held: set[Offer] = set()
        self._writing: dict[Offer, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._closed = False
        self._session: PutSession | None = None
        self._committing: asyncio.Task[None] | None = None
        self._covered: set[ChunkKey] = set()
        self._reserved_at = 0.0
        self._moved: list[MovedBytes] = []
        self.stored: set[ChunkKey] = set()
        self.save_s = 0.0

    @property
    def moved(self) -> list[MovedBytes]:
        """So far, one entry a write."""
        return [*self._moved, *(self._session.moved if self._session is not None else [])]

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
                if not self._offers:
                    self._committed()
            await self._commit_ended()
        finally:
            self.abandon()
            if self._committing is not None:
                self._committing.cancel()
                await asyncio.wait({self._committing})
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
        return [self._offers.popleft() for _ in range(min(len(self._offers), _COMMIT_CHUNKS))]

    async def _save(self, batch: Sequence[Offer]) -> None:
        """Ends with the last write, or with its commit where nothing more is to be written now."""
        session = await self._session_for([offer.key for offer in [*batch, *self._offers]])
        async with asyncio.TaskGroup() as group:
            for offer in batch:
                group.create_task(self._write(session, offer))
        await self._commit_ended()
        self._committing = asyncio.create_task(self._commit(session))
        if not self._offers:
            await self._commit_ended()

    async def _commit_ended(self) -> None:
        if self._committing is not None:
            await self._committing
            self._committing = None

    async def _commit(self, session: PutSession) -> None:
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
        await self._commit_ended()
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
            self._moved += session.moved
            await session.aclose()

    def _let_go(self, offer: Offer) -> None:
        self._held.discard(offer)
        offer.let_go()
