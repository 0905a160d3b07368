"""Between blocks and the store: what to load and save (pure functions), and the jobs that move the bytes.

A job never fails a request: what cannot be loaded is computed, what cannot be saved is left out, both are counted.
Blocks being read into belong to a busy sequence; blocks being written out are held by one reference a chunk.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.base import Handoff, Moved
from engines.paged.blocks import BlockManager
from engines.paged.sequence import TokenSequence
from kvcore.clock import Clock
from kvcore.types import ChunkKey
from kvstore.put_session import PutSession
from kvstore.store import KVStore
from kvstore.types import GetOutcome, Match, MovedBytes

_READ_BATCH = 8
"""Chunks of one get: loaded chunks count as soon as their batch is in."""
_RETRY_S = 0.05
"""Pause after a wait that ended at once with nothing: the metadata server is away."""
_RESERVE_AGAIN_S = 20.0
"""A reservation that is no longer good may have run out, if its session is older than this: ask once more."""


def chunks_to_load(sequence: TokenSequence) -> range:
    """Which chunks to ask the store for: those that are not here and may be reused."""
    return range(sequence.num_computed // sequence.chunk_tokens, sequence.num_reusable_chunks)


def chunks_to_save(sequence: TokenSequence, *, save_output: bool) -> range:
    """Which chunks are full now and were not offered yet. Chunks with generated tokens only if `save_output`."""
    end = sequence.num_computed if save_output else min(sequence.num_computed, sequence.num_prompt)
    return range(sequence.num_offered, max(sequence.num_offered, end // sequence.chunk_tokens))


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
class StorePort:
    """What jobs share: the store, the blocks and their bytes, the clock, the totals."""

    store: KVStore
    blocks: BlockManager
    view: Callable[[int], memoryview]
    clock: Clock
    counters: Counter[str]
    timeout_s: float
    """For one call of the store."""
    freed: Callable[[], None]
    """Called after blocks were given back: somebody may have starved for them."""

    def views(self, blocks: Sequence[int]) -> list[memoryview]:
        """The bytes of some blocks, in order."""
        return [self.view(block) for block in blocks]


class LoadJob:
    """Reads chunks of one busy sequence into its blocks, as they appear if there is a handoff.

    `num_loaded`: that many leading chunks of the sequence are good. It grows batch by batch and holds after a
    cancellation too.
    """

    def __init__(self, port: StorePort, sequence: TokenSequence, handoff: Handoff | None) -> None:
        self._port = port
        self._sequence = sequence
        self._chunks = chunks_to_load(sequence)
        self._handoff = handoff or Handoff(num_chunks=0, wait_s=0.0)
        self._may_wait = handoff is not None
        self._waiting: asyncio.Timeout | None = None
        self.num_loaded = self._chunks.start
        self.moved: list[MovedBytes] = []
        self.wait_s = 0.0
        self.load_s = 0.0

    def stop_waiting(self) -> None:
        """Take what is in the store now, then end."""
        self._may_wait = False
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Ends when all is loaded, at the first chunk that is not good, or when nothing more is to be waited for."""
        clock, deadline = self._port.clock, self._port.clock.now() + self._handoff.wait_s
        while self.num_loaded < self._chunks.stop:
            self._may_wait &= clock.now() < deadline and self.num_loaded < self._handoff.num_chunks
            final = not self._may_wait
            match = await self._find(self._sequence.keys(self._chunks.stop)[self.num_loaded :], deadline - clock.now())
            if match.num_chunks:
                try:
                    good = await self._read(match)
                finally:
                    self._port.store.release_soon(match)
                if not good:
                    return
            elif not final and self._may_wait:
                await asyncio.sleep(min(_RETRY_S, max(0.0, deadline - clock.now())))
            if final:
                self._port.counters["chunk_miss_absent"] += self._chunks.stop - self.num_loaded
                return

    async def _find(self, keys: Sequence[ChunkKey], left_s: float) -> Match:
        if not self._may_wait:
            return await self._port.store.match(keys, timeout_s=self._port.timeout_s)
        started = self._port.clock.now()
        try:
            async with asyncio.timeout(left_s + self._port.timeout_s) as self._waiting:
                return await self._port.store.wait(keys, more_than=0, timeout_s=left_s)
        except TimeoutError:
            return Match()
        finally:
            self._waiting = None
            self.wait_s += self._port.clock.now() - started

    async def _read(self, match: Match) -> bool:
        per_chunk, table = self._port.blocks.blocks_per_chunk, self._sequence.block_table
        for start in range(0, match.num_chunks, _READ_BATCH):
            count = min(_READ_BATCH, match.num_chunks - start)
            first = self.num_loaded
            buffers = [
                self._port.views(table[chunk * per_chunk : (chunk + 1) * per_chunk])
                for chunk in range(first, first + count)
            ]
            began = self._port.clock.now()
            result = await self._port.store.get_into(match, start, buffers, timeout_s=self._port.timeout_s)
            self.load_s += self._port.clock.now() - began
            self.moved += result.moved
            for outcome in result.outcomes:
                if outcome is not GetOutcome.OK:
                    self._port.counters[f"chunk_miss_{outcome}"] += 1
                    return False
                self.num_loaded += 1
                self._port.counters["chunks_loaded"] += 1
        return True


@dataclass(frozen=True, slots=True)
class _Offer:
    key: ChunkKey
    blocks: tuple[int, ...]


class SaveJob:
    """Writes the chunks of one leg into the store, in the order they are offered, and commits them in batches.

    `reserve`: room for these is asked for in one batch at the start, before they are computed. Others get theirs batch
    by batch. `stored`: keys known to be complete in the store.
    """

    def __init__(self, port: StorePort, prefer_segment: str | None, reserve: Sequence[ChunkKey]) -> None:
        self._port = port
        self._prefer_segment = prefer_segment
        self._reserve = list(reserve)
        self._offers: deque[_Offer] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._session: PutSession | None = None
        self._covered: set[ChunkKey] = set()
        self._reserved_at = 0.0
        self.stored: set[ChunkKey] = set()
        self.moved: list[MovedBytes] = []
        self.save_s = 0.0
        self.num_pending = 0

    def offer(self, key: ChunkKey, blocks: Sequence[int]) -> None:
        """A full chunk. Its blocks are held until they are written or declined. Ignored after `close`."""
        if self._closed:
            return
        self._port.blocks.retain(blocks)
        self._offers.append(_Offer(key, tuple(blocks)))
        self.num_pending += 1
        self._wake.set()

    def close(self) -> None:
        """Nothing more will be offered: `run` ends after what was."""
        self._closed = True
        self._wake.set()

    async def run(self) -> None:
        """Ends when closed and all is committed or declined. Blocks and reservations are given back in any case."""
        try:
            if self._reserve:
                await self._begin(self._reserve)
            while batch := await self._next_batch():
                began = self._port.clock.now()
                await self._save(batch)
                self.save_s += self._port.clock.now() - began
        finally:
            self.abandon()
            await self._end_session()

    def abandon(self) -> None:
        """Let go of what was offered and not written; `run` does it too, but a task may be cancelled before it runs."""
        self._closed = True
        while self._offers:
            self._let_go(self._offers.popleft())

    async def _next_batch(self) -> list[_Offer]:
        while not self._offers and not self._closed:
            self._wake.clear()
            await self._wake.wait()
        return list(self._offers)

    async def _save(self, batch: Sequence[_Offer]) -> None:
        session = self._session
        fresh = session is None or session.stale or any(offer.key not in self._covered for offer in batch)
        if session is not None and self._port.clock.now() - self._reserved_at > _RESERVE_AGAIN_S:
            fresh |= not all(session.wants(offer.key) or offer.key in self.stored for offer in batch)
        if fresh:
            keys = [offer.key for offer in batch]
            at = self._reserve.index(keys[-1]) + 1 if keys[-1] in self._reserve else len(self._reserve)
            session = await self._begin(keys + self._reserve[at:])
        assert session is not None
        for offer in batch:
            if session.wants(offer.key):
                views = self._port.views(offer.blocks)
                written = await session.write(
                    offer.key, self._port.blocks.chunk_tokens, views, timeout_s=self._port.timeout_s
                )
                self._port.counters["save_failed"] += not written
            elif offer.key not in self.stored:
                self._port.counters["save_declined"] += 1
            self._let_go(self._offers.popleft())
        committed = await session.commit(timeout_s=self._port.timeout_s)
        self.stored.update(committed)
        self._port.counters["chunks_stored"] += len(committed)

    async def _begin(self, keys: Sequence[ChunkKey]) -> PutSession:
        await self._end_session()
        keys = list(dict.fromkeys(keys))
        self._session = session = await self._port.store.begin_put(
            keys, prefer_segment=self._prefer_segment, timeout_s=self._port.timeout_s
        )
        self._covered, self._reserved_at = set(keys), self._port.clock.now()
        self.stored |= session.complete
        return session

    async def _end_session(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            self.moved += session.moved
            await session.aclose()

    def _let_go(self, offer: _Offer) -> None:
        self.num_pending -= 1
        self._port.blocks.release(offer.blocks)
        self._port.freed()
