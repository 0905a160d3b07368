"""The job that saves chunks from an engine's KV memory into the store.

It serves any engine: it knows keys and bytes only. The engine says where they are (`SavableChunk`) and keeps it
until the job releases it. A job never fails a request: what cannot be saved is left out, and counted.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from engines.jobs.context import JobContext
from kvcore.types import ChunkKey, OwnerTag
from kvstore.put_session import PutSession
from kvstore.types import MovedBytes


@dataclass(eq=False, frozen=True, slots=True)
class SavableChunk:
    """A full chunk that lies in the engine's memory."""

    key: ChunkKey
    num_tokens: int
    reading: Callable[[], AbstractAsyncContextManager[Sequence[memoryview]]]
    """Its payload; the bytes stay as they are inside of the context."""
    release: Callable[[], None] = field(default=lambda: None)
    """Called once: the job does not need the memory any more."""


class SaveJob:
    """Writes the chunks of one request into the store, in the order they are added, and commits them in batches, each
    while the next one is written.

    `reserve`: room for these is asked for in one batch at the start, before they are computed; others get theirs batch
    by batch. `owner`: whose they are, but for those that are `public`. `sizes`: payload bytes of short chunks, may grow
    before they are added.
    `parallel`: writes at a time.
    `void`: once it says so, from whatever thread, nothing more is committed. `committed`: called when all that was
    added so far is.
    `stored`: keys known to be complete.

    A chunk that was added is unreleased until its memory is given back. It is queued first, then in a batch, then
    being written (`_writing` has its task).
    """

    def __init__(
        self,
        context: JobContext,
        prefer_segment: str | None,
        reserve: Sequence[ChunkKey],
        *,
        owner: OwnerTag | None = None,
        public: frozenset[ChunkKey] = frozenset(),
        sizes: Mapping[ChunkKey, int] | None = None,
        parallel: int = 1,
        void: Callable[[], bool] = lambda: False,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        self._context = context
        self._prefer_segment = prefer_segment
        self._reserve = list(reserve)
        self._owner, self._public = owner, public
        self._sizes = {} if sizes is None else sizes
        self._void = void
        self._committed = committed
        self._gate = asyncio.Semaphore(parallel)
        self._queued: deque[SavableChunk] = deque()
        self._unreleased: set[SavableChunk] = set()
        self._writing: dict[SavableChunk, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._closed = False
        self._session: PutSession | None = None
        self._committing: asyncio.Task[None] | None = None
        self._covered: set[ChunkKey] = set()
        self._reserved_at = 0.0
        self._moved: list[MovedBytes] = []
        self.begun = asyncio.Event()
        """Set when `reserve` was answered, or will not be."""
        self.stored: set[ChunkKey] = set()
        self.save_s = 0.0

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return (
            f"<SaveJob {state}, {len(self._queued)} chunks queued, {len(self._writing)} being written, "
            f"{len(self.stored)} stored>"
        )

    @property
    def moved(self) -> list[MovedBytes]:
        """So far, one entry a write."""
        return [*self._moved, *(self._session.moved if self._session is not None else [])]

    @property
    def num_pending(self) -> int:
        """Chunks that were added and whose memory is not released yet."""
        return len(self._unreleased)

    @property
    def full(self) -> bool:
        """Whether the session under way got room for nothing, and not because others have it or write it."""
        return self._session is not None and self._session.full

    def writers(self, key: ChunkKey) -> tuple[str, ...]:
        """The nodes that were writing `key` before the session under way asked for room, as in a Match."""
        return self._session.writers(key) if self._session is not None else ()

    def add(self, chunk: SavableChunk) -> None:
        """One more chunk. Its memory is kept until it is written or declined. Released at once after `close`."""
        if self._closed:
            chunk.release()
            return
        self._queued.append(chunk)
        self._unreleased.add(chunk)
        self._wake.set()

    def close(self) -> None:
        """Nothing more will be added: `run` ends after what was."""
        self._closed = True
        self._wake.set()

    async def run(self) -> None:
        """Ends when closed and all is committed or declined. Memory and reservations are given back in any case."""
        # 1. Before anything is computed: reserve room for the whole prompt in one call.
        # 2. Batch by batch, until closed and empty: write this batch while the one before it is committed.
        # 3. At the end, wait for the last commit.
        # However it ends (closed, cancelled, the store failed): memory first, then the commit under way, then the
        # session, whose reservations nobody may write to after this.
        try:
            if self._reserve:
                await self._begin(self._reserve)
            self.begun.set()
            while batch := await self._next_batch():
                began = self._context.clock.now()
                await self._save(batch)
                self.save_s += self._context.clock.now() - began
                if not self._queued:
                    self._committed()
            await self._commit_ended()
        finally:
            self.begun.set()
            self.abandon()
            if self._committing is not None:
                self._committing.cancel()
                await asyncio.wait({self._committing})
            await self._end_session()

    def abandon(self) -> None:
        """Release what was added and is not being written. `run` does it too, but a task may be cancelled before it
        runs."""
        self.close()
        self._queued.clear()
        for chunk in self._unreleased - self._writing.keys():
            self._release(chunk)

    async def cut(self, timeout_s: float) -> None:
        """The memory is about to be given to others. What is not being written is released; writes under way may end
        within `timeout_s`, then they are cancelled. What was written in whole is committed after this, by `run`."""
        self.abandon()
        if self._writing:
            await asyncio.wait(self._writing.values(), timeout=timeout_s)
        if late := list(self._writing.values()):
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=self._context.limits.cancel_s)

    async def _next_batch(self) -> list[SavableChunk]:
        """The oldest queued chunks; empty once closed and nothing is queued."""
        while not self._queued and not self._closed:
            self._wake.clear()
            await self._wake.wait()
        count = min(len(self._queued), self._context.limits.commit_chunks)
        return [self._queued.popleft() for _ in range(count)]

    async def _save(self, batch: Sequence[SavableChunk]) -> None:
        """Ends with the last write, or with its commit where nothing more is to be written now."""
        session = await self._session_for([chunk.key for chunk in batch])
        async with asyncio.TaskGroup() as group:
            for chunk in batch:
                group.create_task(self._write(session, chunk))
        await self._commit_ended()
        self._committing = asyncio.create_task(self._commit(session))
        if not self._queued:
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
        """The session to write `keys` in: the one under way, or a new one that reserves again, for what comes too.

        1. There is none, it does not cover every key, or it is stale (the metadata server was away when it began, or
           has refused a commit since; or it has run out): a new one.
        2. It is old enough for reservations to have expired, and a key has neither a reservation nor a stored chunk:
           a new one.
        3. Else the one under way: a key without a reservation was declined, and would be again."""
        session = self._session
        fresh = session is None or session.stale or not self._covered.issuperset(keys)
        if session is not None and self._context.clock.now() - self._reserved_at > self._context.limits.reserve_again_s:
            fresh |= not all(session.wants(key) or key in self.stored for key in keys)
        if not fresh:
            assert session is not None
            return session
        keys += [chunk.key for chunk in self._queued]
        at = self._reserve.index(keys[-1]) + 1 if keys[-1] in self._reserve else len(self._reserve)
        return await self._begin(keys + self._reserve[at:])

    async def _write(self, session: PutSession, chunk: SavableChunk) -> None:
        async with self._gate:
            if chunk not in self._unreleased:  # cut meanwhile
                return
            task = asyncio.current_task()
            assert task is not None
            self._writing[chunk] = task
            try:
                if session.wants(chunk.key):
                    async with chunk.reading() as payload:
                        written = await session.write(
                            chunk.key, chunk.num_tokens, payload, timeout_s=self._context.timeout_s
                        )
                    self._context.counters["save_failed"] += not written
                elif chunk.key not in self.stored:
                    self._context.counters["save_declined"] += 1
            finally:
                del self._writing[chunk]
                self._release(chunk)

    async def _begin(self, keys: Sequence[ChunkKey]) -> PutSession:
        """Close the session under way and reserve room for `keys` in a new one."""
        await self._commit_ended()
        await self._end_session()
        keys = list(dict.fromkeys(keys))
        self._session = session = await self._context.store.begin_put(
            keys,
            prefer_segment=self._prefer_segment,
            timeout_s=self._context.timeout_s,
            sizes=self._sizes,
            owner=self._owner,
            public=self._public,
        )
        self._covered, self._reserved_at = set(keys), self._context.clock.now()
        self.stored |= session.complete
        return session

    async def _end_session(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            self._moved += session.moved
            await session.aclose()

    def _release(self, chunk: SavableChunk) -> None:
        self._unreleased.discard(chunk)
        chunk.release()
