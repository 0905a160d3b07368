"""What plain servers were sent lately: a guess at their prefix caches, of which they tell the router nothing.

Owns the guess. A wrong one costs a worse route, never a wrong answer. The prefix tree lies in the index as blocks of
tokens: a block's key stands for all before it, so what two prompts share is one path.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvcore.chunk_keys import chunk_keys, root_key, usable_chunks
from kvcore.types import ChunkKey
from router.routing.index import KeptKeys, PrefixHits, PrefixIndex

_FINGERPRINT = bytes(16)


class SentPrefixes:
    """Of each server the blocks that it was sent last, `max_blocks` of `block_tokens` tokens: vLLM's block, and about
    the half million tokens that a server with one large GPU caches."""

    def __init__(self, block_tokens: int = 16, max_blocks: int = 32_768, max_hashed: int = 65_536) -> None:
        """`max_hashed`: blocks of requests under way whose keys are kept; a prompt is hashed once, not for each of its
        choices and legs."""
        self._block_tokens, self._max_blocks, self._max_hashed = block_tokens, max_blocks, max_hashed
        self._hashed = OrderedDict[int, tuple[Sequence[int], bytes, list[ChunkKey]]]()
        """By the identity of a prompt, which nobody changes."""
        self._num_hashed = 0
        self._index = PrefixIndex()
        self._sent: dict[str, OrderedDict[ChunkKey, None]] = {}
        self._full: set[str] = set()
        """Servers that are taken to have forgotten something for what they were sent since."""

    def __repr__(self) -> str:
        return f"<SentPrefixes {len(self._index)} blocks at {len(self._sent)} servers>"

    def sent(self, server: str, prompt_token_ids: Sequence[int], salt: bytes) -> None:
        """It is to compute this prompt. What it was sent longest ago is taken to be forgotten, ends before beginnings,
        as vLLM's cache does."""
        keys, blocks = self._keys(prompt_token_ids, salt), self._sent.setdefault(server, OrderedDict())
        for key in reversed(keys):
            blocks[key] = None
            blocks.move_to_end(key)
        self._index.store(server, keys)
        over = len(blocks) - self._max_blocks
        if over > 0:
            self._index.remove(server, [blocks.popitem(last=False)[0] for _ in range(over)])
            self._full.add(server)

    def forget(self, server: str) -> None:
        """It has started anew, or is away."""
        self._full.discard(server)
        if self._sent.pop(server, None) is not None:
            self._index.drop_node(server)

    def find(self, prompt_token_ids: Sequence[int], salt: bytes, kept: KeptKeys | None = None) -> PrefixHits:
        """How many leading tokens of this prompt each server has, the last one never: it is computed for the answer.
        `kept`: as for `Cluster.hits`."""
        if not self._sent:
            return PrefixHits(each_its_own=True)
        size, kept = self._block_tokens, {} if kept is None else kept
        keys = kept.get((_FINGERPRINT, size))
        if keys is None:
            count = usable_chunks(len(prompt_token_ids), size)
            keys = kept[_FINGERPRINT, size] = self._keys(prompt_token_ids, salt)[:count]
        found = self._index.find(keys)
        by_node = {server: count * size for server, count in found.by_node.items()}
        return PrefixHits(found.longest * size, by_node, each_its_own=True, full=bool(self._full))

    def _keys(self, prompt_token_ids: Sequence[int], salt: bytes) -> list[ChunkKey]:
        known = self._hashed.get(id(prompt_token_ids))
        if known is not None and known[0] is prompt_token_ids and known[1] == salt:
            return known[2]
        keys = chunk_keys(root_key(_FINGERPRINT, salt), prompt_token_ids, self._block_tokens)
        if known is not None:
            self._forget_hashed(id(prompt_token_ids))
        self._num_hashed += 1 + len(keys)
        self._hashed[id(prompt_token_ids)] = prompt_token_ids, salt, keys
        while self._num_hashed > self._max_hashed:
            self._forget_hashed(next(iter(self._hashed)))
        return keys

    def _forget_hashed(self, prompt: int) -> None:
        self._num_hashed -= 1 + len(self._hashed.pop(prompt)[2])
