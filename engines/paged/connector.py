"""Between blocks and the store: what to load and save (pure functions), and the jobs over this engine's blocks.

Blocks being read into belong to a busy sequence; blocks being written out are held by one reference a chunk.
"""

import functools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from engines.jobs import load as load_job
from engines.jobs import save as save_job
from engines.jobs.load import JobContext
from engines.jobs.save import Offer
from engines.paged.blocks import BlockManager
from engines.paged.sequence import TokenSequence
from kvcore.clock import Clock
from kvcore.types import ChunkKey
from kvstore.store import KVStore
from nodeapi.messages import Handoff


def chunks_to_load(sequence: TokenSequence) -> range:
    """Which chunks to ask the store for: those that are not here and may be reused."""
    return range(sequence.num_computed // sequence.chunk_tokens, sequence.num_reusable_chunks)


def chunks_to_save(sequence: TokenSequence, *, save_output: bool) -> range:
    """Which chunks are full now and were not offered yet. Chunks with generated tokens only if `save_output`."""
    end = sequence.num_computed if save_output else min(sequence.num_computed, sequence.num_prompt)
    return range(sequence.num_offered, max(sequence.num_offered, end // sequence.chunk_tokens))


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

    @property
    def context(self) -> JobContext:
        """What a job needs of it."""
        return JobContext(self.store, self.clock, self.counters, self.timeout_s)

    def views(self, blocks: Sequence[int]) -> list[memoryview]:
        """The bytes of some blocks, in order."""
        return [self.view(block) for block in blocks]

    @asynccontextmanager
    async def reading(self, blocks: Sequence[int]) -> AsyncIterator[list[memoryview]]:
        """Those of blocks that somebody holds a reference to."""
        yield self.views(blocks)


class LoadJob(load_job.LoadJob):
    """Reads chunks of one busy sequence into its blocks."""

    def __init__(self, port: StorePort, sequence: TokenSequence, handoff: Handoff | None) -> None:
        chunks, handoff = chunks_to_load(sequence), handoff or Handoff(num_chunks=0, wait_s=0.0)
        per_chunk = port.blocks.blocks_per_chunk

        @asynccontextmanager
        async def into(first: int, count: int) -> AsyncIterator[list[list[memoryview]]]:
            table = sequence.block_table
            starts = range((chunks.start + first) * per_chunk, (chunks.start + first + count) * per_chunk, per_chunk)
            yield [port.views(table[start : start + per_chunk]) for start in starts]

        super().__init__(
            port.context,
            sequence.keys(chunks.stop)[chunks.start :],
            into,
            first=chunks.start,
            wait_chunks=handoff.num_chunks,
            deadline=port.clock.now() + handoff.wait_s,
        )


class SaveJob(save_job.SaveJob):
    """Writes the chunks of one leg."""

    def __init__(self, port: StorePort, prefer_segment: str | None, reserve: Sequence[ChunkKey]) -> None:
        super().__init__(port.context, prefer_segment, reserve)
        self._port = port

    def offer(self, key: ChunkKey, blocks: Sequence[int]) -> None:
        """A full chunk. Its blocks are held until they are written or declined."""
        held, port = tuple(blocks), self._port
        port.blocks.retain(held)
        reading = functools.partial(port.reading, held)
        self.add(Offer(key, port.blocks.chunk_tokens, reading, functools.partial(self._release, held)))

    def _release(self, blocks: tuple[int, ...]) -> None:
        self._port.blocks.release(blocks)
        self._port.freed()
