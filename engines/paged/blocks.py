"""Who holds which block of KV, and which sealed chunks can be found again. Pure: numbers, no bytes.

A chunk is `blocks_per_chunk` whole blocks sealed under one key; it is found, reused and evicted whole. A block is
1. free: no reference, in no chunk, contents undefined; `allocate` takes these first;
2. referenced: by sequences, or by a save that reads it; it may be in a sealed chunk at the same time;
3. cached: no reference to any block of its chunk, and the chunk can still be found; evicted least recently used first;
4. idle in a chunk of which other blocks are referenced: neither free nor to be evicted until those are given back.
`check` asserts all of it.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.types import ChunkKey


@dataclass(slots=True)
class _SealedChunk:
    key: ChunkKey
    blocks: tuple[int, ...]
    num_referenced: int
    """How many of its blocks are referenced; while it is 0, the chunk may be evicted."""


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

    def __repr__(self) -> str:
        return (
            f"<BlockManager {self.used_blocks} of {self.num_blocks} blocks used, {self.cached_blocks} cached, "
            f"{len(self._free)} free>"
        )

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
        """Blocks that cannot be allocated now: referenced, or in a chunk of which others are."""
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
        while len(self._free) < count:  # a chunk is evicted whole, so some of its blocks may stay free
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

    def holds(self, key: ChunkKey) -> bool:
        """Whether `reuse_chunk` would find it."""
        return key in self._by_key

    def reuse_chunk(self, key: ChunkKey) -> tuple[int, ...] | None:
        """The blocks sealed under `key`, with one more reference each, or None."""
        # 1. Nothing is sealed under the key.
        # 2. The chunk is cached: it leaves the queue of those that may be evicted, and every block gets its first
        #    reference.
        # 3. Some or all of its blocks are referenced: those get one more, the others their first.
        chunk = self._by_key.get(key)
        if chunk is None:
            return None
        self._unreferenced.pop(key, None)
        for block in chunk.blocks:
            if self._references[block] == 0:
                chunk.num_referenced += 1
            self._references[block] += 1
        return chunk.blocks

    def seal(self, key: ChunkKey, blocks: Sequence[int]) -> bool:
        """Make `blocks`, referenced and full for good, findable under `key`. False: the key was known (the older copy
        stays the findable one) or the blocks are sealed already."""
        assert len(blocks) == self.blocks_per_chunk
        if key in self._by_key or blocks[0] in self._by_block:
            return False
        assert all(self._references[block] > 0 and block not in self._by_block for block in blocks)
        chunk = _SealedChunk(key, tuple(blocks), num_referenced=len(blocks))
        self._by_key[key] = chunk
        self._by_block.update(dict.fromkeys(blocks, chunk))
        return True

    def forget(self, key: ChunkKey) -> None:
        """Have what is sealed under `key`, if anything is, found no more."""
        chunk = self._by_key.pop(key, None)
        if chunk is None:
            return
        self._unreferenced.pop(key, None)
        for block in chunk.blocks:
            del self._by_block[block]
        self._free.extend(block for block in chunk.blocks if not self._references[block])

    def check(self) -> None:
        """Assert every invariant. Costs a pass over all blocks: for tests and the simulation."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        cached = {block for chunk in self._unreferenced.values() for block in chunk.blocks}
        assert not free & cached, "a block that is cached is free"
        of_referenced = self._by_block.keys() - cached
        assert not of_referenced & free, "a block of a referenced chunk is free"
        assert min(self._references, default=0) >= 0
        unreferenced = {block for block, references in enumerate(self._references) if not references}
        assert unreferenced - of_referenced == free | cached, "blocks without references are idle, and no others"
        for key, chunk in self._by_key.items():
            assert chunk.key == key and len(chunk.blocks) == self.blocks_per_chunk
            assert all(self._by_block[block] is chunk for block in chunk.blocks)
            assert chunk.num_referenced == sum(self._references[block] > 0 for block in chunk.blocks)
            assert (chunk.num_referenced == 0) == (key in self._unreferenced)
        assert len(self._by_block) == len(self._by_key) * self.blocks_per_chunk

    def _drop_last_reference(self, block: int) -> None:
        # 1. In no chunk: nobody can find its contents, it is free.
        # 2. In a chunk: free only when the chunk is evicted, which may happen once the last of its blocks came here.
        chunk = self._by_block.get(block)
        if chunk is None:
            self._free.append(block)
            return
        chunk.num_referenced -= 1
        if chunk.num_referenced == 0:
            self._unreferenced[chunk.key] = chunk

    def _evict_oldest(self) -> None:
        key, chunk = self._unreferenced.popitem(last=False)
        del self._by_key[key]
        for block in chunk.blocks:
            del self._by_block[block]
        self._free.extend(chunk.blocks)
