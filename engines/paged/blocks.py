"""Who holds which block of KV, and which sealed chunks can be found again. Pure: numbers, no bytes.

A block is free, referenced, or cached. A chunk is `blocks_per_chunk` whole blocks sealed under one key, reused whole;
once nobody references it, it stays findable and is evicted least recently used first. `check` holds the invariants.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.types import ChunkKey


@dataclass(slots=True)
class _SealedChunk:
    key: ChunkKey
    blocks: tuple[int, ...]
    held: int
    """How many of its blocks are referenced."""


class BlockManager:
    """References, prefix index and eviction over `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, blocks_per_chunk: int) -> None:
        assert num_blocks > 0 and block_size > 0 and blocks_per_chunk > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.blocks_per_chunk = blocks_per_chunk
        self._free: deque[int] = deque(range(num_blocks))
        self._references = [0] * num_blocks
        self._by_key: dict[ChunkKey, _SealedChunk] = {}
        self._by_block: dict[int, _SealedChunk] = {}
        self._unreferenced: OrderedDict[ChunkKey, _SealedChunk] = OrderedDict()

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one chunk."""
        return self.block_size * self.blocks_per_chunk

    @property
    def cached_blocks(self) -> int:
        """Blocks that nobody references and that hold a findable chunk."""
        return len(self._unreferenced) * self.blocks_per_chunk

    @property
    def available_blocks(self) -> int:
        """How many blocks `allocate` can give now, by eviction too."""
        return len(self._free) + self.cached_blocks

    @property
    def used_blocks(self) -> int:
        """Blocks with a reference."""
        return self.num_blocks - self.available_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` will succeed."""
        return count <= self.available_blocks

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each and undefined contents. Evicts cached chunks where needed."""
        assert self.can_allocate(count), "ask can_allocate first"
        while len(self._free) < count:
            self._evict_oldest()
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """One more reference to each of `blocks`, which are referenced already."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is not referenced"
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give one reference to each of `blocks` back. From the last to the first, so that of a sequence's chunks the
        tail, useless without what precedes it, is evicted first."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released once too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._drop_last_reference(block)

    def take_chunk(self, key: ChunkKey) -> tuple[int, ...] | None:
        """The blocks sealed under `key`, with one more reference each, or None."""
        chunk = self._by_key.get(key)
        if chunk is None:
            return None
        self._unreferenced.pop(key, None)
        for block in chunk.blocks:
            if self._references[block] == 0:
                chunk.held += 1
            self._references[block] += 1
        return chunk.blocks

    def seal(self, key: ChunkKey, blocks: Sequence[int]) -> bool:
        """Make `blocks`, referenced and full for good, findable under `key`. False: the key was known (the older copy
        stays the findable one) or the blocks are sealed already."""
        assert len(blocks) == self.blocks_per_chunk
        if key in self._by_key or blocks[0] in self._by_block:
            return False
        assert all(self._references[block] > 0 and block not in self._by_block for block in blocks)
        chunk = _SealedChunk(key, tuple(blocks), held=len(blocks))
        self._by_key[key] = chunk
        self._by_block.update(dict.fromkeys(blocks, chunk))
        return True

    def check(self) -> None:
        """Assert every invariant. Costs a pass over all blocks: for tests and the simulation."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        cached = {block for chunk in self._unreferenced.values() for block in chunk.blocks}
        for block, references in enumerate(self._references):
            assert references >= 0
            idle = (block in free) + (block in cached)
            if block in self._by_block and block not in cached:
                assert idle == 0, f"block {block} of a held chunk is free"
            else:
                assert idle == (references == 0), f"block {block}: {references} references, idle {idle}"
        for key, chunk in self._by_key.items():
            assert chunk.key == key and len(chunk.blocks) == self.blocks_per_chunk
            assert all(self._by_block[block] is chunk for block in chunk.blocks)
            assert chunk.held == sum(self._references[block] > 0 for block in chunk.blocks)
            assert (chunk.held == 0) == (key in self._unreferenced)
        assert len(self._by_block) == len(self._by_key) * self.blocks_per_chunk

    def _drop_last_reference(self, block: int) -> None:
        chunk = self._by_block.get(block)
        if chunk is None:
            self._free.append(block)
            return
        chunk.held -= 1
        if chunk.held == 0:
            self._unreferenced[chunk.key] = chunk

    def _evict_oldest(self) -> None:
        key, chunk = self._unreferenced.popitem(last=False)
        del self._by_key[key]
        for block in chunk.blocks:
            del self._by_block[block]
        self._free.extend(chunk.blocks)
