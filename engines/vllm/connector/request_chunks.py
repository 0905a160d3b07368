"""One request's tokens as chunks: their keys, and their places in its block table. Pure."""

from collections.abc import Sequence

from engines.vllm.connector.orders import ChunkPlace, LegParams
from kvcore.chunk_keys import KeyChain, next_key, usable_chunks
from kvcore.types import ChunkKey


class RequestChunks:
    """Keys are computed once, when they are asked for. `token_ids` may grow meanwhile, but keeps what it has."""

    def __init__(self, chain: KeyChain, token_ids: Sequence[int], *, chunk_tokens: int, block_size: int) -> None:
        self._chain = chain
        self._token_ids = token_ids
        self.chunk_tokens = chunk_tokens
        self._block_size = block_size
        self._keys: list[ChunkKey] = []

    def keys(self, count: int) -> list[ChunkKey]:
        """The keys of the first `count` full chunks. Their tokens must be known."""
        if len(self._keys) < count:
            self._chain.extend(self._keys, self._token_ids, count, self.chunk_tokens)
            assert len(self._keys) == count, "a key was asked for before its chunk's tokens are known"
        return self._keys[:count]

    def key(self, index: int, end_token: int) -> ChunkKey:
        """The key of chunk `index`, which ends at `end_token` if that comes before it is full."""
        start, stop = self._span(index, end_token)
        if stop - start == self.chunk_tokens:
            self.keys(index + 1)
            return self._keys[index]
        self.keys(index)
        return next_key(self._chain.parent(self._keys, index), self._token_ids[start:stop])

    def public_keys(self, end_token: int) -> tuple[ChunkKey, ...]:
        """Of the full chunks before `end_token` that are nobody's own."""
        return tuple(self.keys(min(self._chain.public_chunks, end_token // self.chunk_tokens)))

    def num_blocks(self, index: int, end_token: int) -> int:
        """How many blocks the chunk's tokens take; the last one may be filled in part."""
        start, stop = self._span(index, end_token)
        return -(-(stop - start) // self._block_size)

    def places(self, first: int, end_token: int, block_ids: Sequence[int]) -> tuple[ChunkPlace, ...]:
        """All chunks from `first` on that hold tokens before `end_token`; the last one may be short of a full chunk."""
        per_chunk = self.chunk_tokens // self._block_size
        places = []
        for index in range(first, -(-end_token // self.chunk_tokens)):
            start, stop = self._span(index, end_token)
            count = self.num_blocks(index, end_token)
            blocks = tuple(block_ids[index * per_chunk : index * per_chunk + count])
            assert len(blocks) == count, f"chunk {index} needs {count} blocks, the block table ends after {len(blocks)}"
            places.append(ChunkPlace(key=self.key(index, end_token), num_tokens=stop - start, block_ids=blocks))
        return tuple(places)

    def _span(self, index: int, end_token: int) -> tuple[int, int]:
        start = index * self.chunk_tokens
        return start, min(end_token, start + self.chunk_tokens)


def handed_off_tokens(params: LegParams, num_prompt_tokens: int, chunk_tokens: int) -> int:
    """How many leading tokens of the prompt a prefiller computes: all of them if the tail is among them."""
    if params.handoff_chunks is None:
        return 0
    usable = usable_chunks(num_prompt_tokens, chunk_tokens)
    if params.tail and params.handoff_chunks >= usable:
        return num_prompt_tokens
    return min(params.handoff_chunks, usable) * chunk_tokens
