"""Between the legs and the store: which chunks to load and save (pure functions), and the tasks that do it.

Owns the running jobs. A job that fails costs its request the chunks that it did not move, never an error.
Invariants: blocks that are read into belong to a busy sequence; blocks that are written out hold a reference.
"""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from contextlib import asynccontextmanager
from typing import NamedTuple

from engines.jobs.context import JobContext
from engines.jobs.load import LoadJob
from engines.jobs.save import SavableChunk, SaveJob
from engines.paged.blocks import BlockManager
from engines.paged.leg import Leg
from engines.paged.sequence import TokenSequence
from kvcore.telemetry import log_fields
from kvcore.types import ChunkKey, OwnerTag

_log = logging.getLogger("engines")


def chunks_to_load(sequence: TokenSequence) -> range:
    """Which chunks to ask the store for: those that are not here and may be reused."""
    return range(sequence.num_computed // sequence.chunk_tokens, sequence.num_reusable_chunks)


def chunks_to_save(sequence: TokenSequence, *, save_output: bool) -> range:
    """Which chunks are full now and were not submitted yet. Chunks with generated tokens only if `save_output`."""
    end = min(sequence.num_computed, sequence.keyed_tokens)
    if not save_output:
        end = min(end, sequence.num_prompt)
    return range(sequence.num_submitted, max(sequence.num_submitted, end // sequence.chunk_tokens))


class ChunkClaim(NamedTuple):
    """Room that was asked for before chunks are computed. `task` gives the keys that are complete when `job` ends."""

    job: SaveJob
    task: "asyncio.Task[frozenset[ChunkKey]]"


class StoreJobs:
    """Loads and saves of an engine's legs, each a task of `tasks`. Without a `context` there is no store: nothing is
    saved, and no load may be started.

    `loaded(sequence, num_chunks)` is called as a load goes on, `load_ended(sequence, num_chunks)` when it has ended in
    whatever way; `give_up(sequence)` when it is not to be computed; `wake` whenever blocks were given back or a leg may
    go on.
    """

    def __init__(
        self,
        context: JobContext | None,
        blocks: BlockManager,
        block_view: Callable[[int], memoryview],
        tasks: asyncio.TaskGroup,
        *,
        save_output: bool,
        loaded: Callable[[TokenSequence, int], None],
        load_ended: Callable[[TokenSequence, int], object],
        give_up: Callable[[TokenSequence], None],
        wake: Callable[[], None],
    ) -> None:
        self._context = context
        self._blocks = blocks
        self._block_view = block_view
        self._tasks = tasks
        self._save_output = save_output
        self._loaded = loaded
        self._load_ended = load_ended
        self._give_up = give_up
        self._wake = wake
        self._saves: dict[asyncio.Task[None] | asyncio.Task[frozenset[ChunkKey]], SaveJob] = {}
        self._warn_at = 0.0

    @property
    def connected(self) -> bool:
        """Whether there is a store."""
        return self._context is not None

    @property
    def num_pending(self) -> int:
        """Chunks that wait to be saved, or are being saved."""
        return sum(save.num_pending for save in self._saves.values())

    async def register(self, memory: memoryview) -> None:
        """Tell the store where blocks lie. Raises ConfigError where its transports cannot have that memory."""
        if self._context is not None:
            await self._context.store.register(memory)

    def start_load(self, leg: Leg, sequence: TokenSequence) -> None:
        """Load what the store has of a sequence's missing chunks, and wait for those of its handoff, or for those that
        another node is computing."""
        assert self._context is not None
        chunks, handoff = chunks_to_load(sequence), leg.handoff
        leg.load = job = LoadJob(
            self._context,
            sequence.keys(chunks.stop)[chunks.start :],
            functools.partial(self._destination, sequence, chunks.start),
            first=chunks.start,
            wait_chunks=handoff.num_chunks if handoff is not None else 0,
            deadline=leg.arrived + (handoff.wait_s if handoff is not None else 0.0),
            loaded=functools.partial(self._progress, sequence),
            claim=functools.partial(self._claim, leg, sequence) if leg.saves else None,
            store_only=leg.is_prefill and leg.saves,
            owner=sequence.owner,
        )
        leg.load_task = self._tasks.create_task(self._guard(job.run, "load"), name="engine-load")
        leg.load_task.add_done_callback(lambda _: self._end_load(leg, sequence, job))

    def start_save(self, leg: Leg, sequence: TokenSequence) -> None:
        """Reserve room for the prompt's chunks and save those that are here, unless that has begun. A prefill leg saves
        all its chunks, those found here too: the store may have lost them."""
        if self._context is not None and leg.save is None and leg.saves:
            first = 0 if leg.is_prefill else sequence.num_computed // sequence.chunk_tokens
            sequence.num_submitted = first
            prompt_chunks = min(sequence.num_prompt, sequence.keyed_tokens) // sequence.chunk_tokens
            wanted = sequence.keys(prompt_chunks)[first:]
            owner, public = sequence.owner, sequence.public_keys
            leg.save = job = SaveJob(self._context, leg.prefer_segment, wanted, owner=owner, public=public)
            leg.save_task = self._tasks.create_task(self._guard(job.run, "save"), name="engine-save")
            leg.save_task.add_done_callback(functools.partial(self._end_save, leg, job))
            self._saves[leg.save_task] = job
        self.save_full_chunks(leg, sequence)

    def save_full_chunks(self, leg: Leg, sequence: TokenSequence) -> None:
        """Submit the chunks that have become full. Their blocks are referenced until they are written or declined."""
        if leg.save is None:
            return
        per_chunk = self._blocks.blocks_per_chunk
        for chunk in chunks_to_save(sequence, save_output=self._save_output):
            blocks = tuple(sequence.block_table[chunk * per_chunk : (chunk + 1) * per_chunk])
            self._blocks.retain(blocks)
            reading, release = functools.partial(self._reading, blocks), functools.partial(self._release, blocks)
            leg.save.add(SavableChunk(sequence.key(chunk), sequence.chunk_tokens, reading, release))
            sequence.num_submitted = chunk + 1

    def claim_chunks(self, keys: Sequence[ChunkKey], owner: OwnerTag, prefer_segment: str | None) -> ChunkClaim | None:
        """Ask for room for chunks that are no request's, before they are computed: the claim to compute them. It holds
        until they are saved by it, or its job is closed. None: there is no store."""
        if self._context is None:
            return None
        job = SaveJob(self._context, prefer_segment, keys, owner=owner)

        async def run() -> frozenset[ChunkKey]:
            await self._guard(job.run, "save")
            return frozenset(job.stored)

        task = self._tasks.create_task(run(), name="engine-save")
        self._saves[task] = job
        task.add_done_callback(functools.partial(self._end_loose_save, job))
        return ChunkClaim(job, task)

    def save_chunks(
        self, chunks: Sequence[tuple[ChunkKey, int, Sequence[int]]], claim: ChunkClaim | None
    ) -> asyncio.Task[frozenset[ChunkKey]] | None:
        """Save chunks, (key, tokens, blocks) each, that were claimed. A reference to each block is given back. The task
        gives the keys that are complete in the store then. None: there is no store."""
        if claim is None:
            for _, _, blocks in chunks:
                self._blocks.release(blocks)
            return None
        for key, num_tokens, blocks in chunks:
            reading, release = functools.partial(self._reading, blocks), functools.partial(self._release, blocks)
            claim.job.add(SavableChunk(key, num_tokens, reading, release))
        claim.job.close()
        return claim.task

    def _end_loose_save(self, job: SaveJob, task: asyncio.Task[frozenset[ChunkKey]]) -> None:
        job.abandon()
        del self._saves[task]
        self._wake()

    async def count_stored(self, leg: Leg) -> int:
        """Leading chunks of a prefill that are complete in the store: ours, or another writer's of the same prefix, who
        may still be at it."""
        if self._context is None:
            return 0
        keys = leg.first.keys(leg.first.num_prompt // leg.first.chunk_tokens)
        if leg.save is not None and leg.save.stored.issuperset(keys):
            return len(keys)
        store, clock, limits = self._context.store, self._context.clock, self._context.limits
        match = await store.match(keys, timeout_s=self._context.timeout_s, leased=False)
        known, until, ask = match.num_chunks, clock.now() + limits.follow_s, limits.ask_chunks
        while known < len(keys) and (match.writers or match.num_chunks == ask) and clock.now() < until:
            asked = keys[known : known + ask]
            match = await store.wait(
                asked, more_than=0, timeout_s=limits.follow_poll_s, leased=False, owner=leg.first.owner
            )
            known += match.num_chunks
            if match.num_chunks:
                until = clock.now() + limits.follow_s
            else:  # a server with too many waiters answers at once
                await asyncio.sleep(limits.retry_s)
        return known

    async def finish(self, timeout_s: float) -> None:
        """Let saves under way end, for `timeout_s` at most."""
        if self._saves:
            await asyncio.wait(self._saves, timeout=timeout_s)

    def cancel(self) -> None:
        """Cancel the saves under way. Loads are cancelled with their legs."""
        for task in self._saves:
            task.cancel()

    async def _claim(self, leg: Leg, sequence: TokenSequence, given_up: Set[str]) -> Sequence[str]:
        """See `Claim`."""
        assert self._context is not None
        self.start_save(leg, sequence)
        save, task = leg.save, leg.save_task
        assert save is not None and task is not None
        await save.begun.wait()
        writers = save.writers(sequence.key(sequence.num_computed // sequence.chunk_tokens))
        if set(writers) - given_up - {self._context.store.node_id}:
            leg.save = leg.save_task = None
            task.cancel()
            await asyncio.wait([task])
        elif save.full and leg.is_prefill:
            self._end_without_room(leg, sequence)
        return writers

    def _end_without_room(self, leg: Leg, sequence: TokenSequence) -> None:
        """What this prefill would compute cannot be handed over: the decoder had better begin at once."""
        context = self._context
        assert context is not None and leg.save is not None
        leg.no_room = True
        self._give_up(sequence)
        leg.save.close()
        context.counters["prefills_without_room"] += 1
        if context.clock.now() >= self._warn_at:
            self._warn_at = context.clock.now() + context.limits.warn_s
            chunks = sequence.num_reusable_chunks - sequence.num_computed // sequence.chunk_tokens
            advice = "no segment has room for it, or its tenant has all of `store.tenant_share`: decoders compute such "
            advice += "prompts themselves; give nodes larger segments"
            log_fields(_log, logging.WARNING, "no_room", request=leg.request_id, chunks=chunks, advice=advice)

    def _progress(self, sequence: TokenSequence, num_chunks: int) -> None:
        self._loaded(sequence, num_chunks)
        self._wake()

    def _end_load(self, leg: Leg, sequence: TokenSequence, job: LoadJob) -> None:
        if job.all_stored:  # a prefill has nothing to do then
            sequence.num_cached = sequence.num_prompt
            if self._context is not None:
                self._context.counters["cached_tokens"] += sequence.num_prompt
            self._give_up(sequence)
            leg.set_saved()
        self._load_ended(sequence, job.num_loaded)
        self._wake()

    def _end_save(self, leg: Leg, job: SaveJob, task: asyncio.Task[None]) -> None:
        job.abandon()
        del self._saves[task]
        if leg.save is job:  # else another node computes what it was for
            leg.set_saved()
        self._wake()

    async def _guard(self, run: Callable[[], Awaitable[None]], what: str) -> None:
        """Run a job. What it has not done when it fails, the request goes without."""
        try:
            await run()
        except Exception:  # the boundary of a request with the store: never the request's failure
            if self._context is not None:
                self._context.counters[f"{what}_failed"] += 1
            _log.exception("event=%s_failed", what)

    @asynccontextmanager
    async def _destination(
        self, sequence: TokenSequence, first_chunk: int, first: int, count: int
    ) -> AsyncIterator[list[list[memoryview]]]:
        """The `Destination` of a sequence's load, which begins with its chunk `first_chunk`."""
        per_chunk, table = self._blocks.blocks_per_chunk, sequence.block_table
        starts = range((first_chunk + first) * per_chunk, (first_chunk + first + count) * per_chunk, per_chunk)
        yield [[self._block_view(block) for block in table[start : start + per_chunk]] for start in starts]

    @asynccontextmanager
    async def _reading(self, blocks: Sequence[int]) -> AsyncIterator[list[memoryview]]:
        """The bytes of referenced blocks: nobody writes into full ones."""
        yield [self._block_view(block) for block in blocks]

    def _release(self, blocks: Sequence[int]) -> None:
        self._blocks.release(blocks)
        self._wake()
