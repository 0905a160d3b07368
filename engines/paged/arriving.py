"""Blocks for chunks that are no sequence's while they arrive from the store."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from engines.paged.blocks import BlockManager
from kvcore.errors import OverloadedError
from kvcore.types import ChunkKey


class ArrivingBlocks:
    """Where a document's load goes: blocks are taken as chunks come, and found by their keys once they are good."""

    def __init__(self, keys: Sequence[ChunkKey], blocks: BlockManager, view: Callable[[int], memoryview]) -> None:
        self._keys = keys
        self._blocks = blocks
        self._view = view
        self._taken: dict[int, list[int]] = {}

    @asynccontextmanager
    async def into(self, first: int, count: int) -> AsyncIterator[list[list[memoryview]]]:
        """A `Destination`."""
        per_chunk = self._blocks.blocks_per_chunk
        if not self._blocks.can_allocate(count * per_chunk):
            raise OverloadedError("there are no blocks for a document")
        for chunk in range(first, first + count):
            self._taken[chunk] = self._blocks.allocate(per_chunk)
        yield [[self._view(block) for block in self._taken[chunk]] for chunk in range(first, first + count)]

    def loaded(self, num_chunks: int) -> None:
        """The first `num_chunks` are good."""
        for chunk in [chunk for chunk in self._taken if chunk < num_chunks]:
            blocks = self._taken.pop(chunk)
            self._blocks.seal(self._keys[chunk], blocks)
            self._blocks.release(blocks)

    def close(self) -> None:
        """Nothing writes into the others any more."""
        for blocks in self._taken.values():
            self._blocks.release(blocks)
        self._taken.clear()
