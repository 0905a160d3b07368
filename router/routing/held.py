"""What engines have of others' chunks in blocks of their own: a decoder that has read a prompt's beginning out of
another node's memory need not read it again, so that a hot one is soon held by as many decoders as its load asks for.

Owns the guess, which no engine tells: a wrong one costs reading again, never a wrong answer. Nothing is copied for it:
engines keep what they have read for as long as they have room, and it goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from msgspec.structs import replace

from kvcore.types import ChunkKey
from nodeapi.messages import EngineInfo
from router.routing.index import PrefixHits, PrefixIndex


class HeldPrefixes:
    """Of each node the prompts that it had last, `share` of what its engine has room for."""

    def __init__(self, share: float = 0.5) -> None:
        self._share = share
        self._index = PrefixIndex()
        self._held: dict[str, OrderedDict[ChunkKey, None]] = {}

    def __repr__(self) -> str:
        return f"<HeldPrefixes {len(self._index)} chunks in {len(self._held)} engines>"

    def count(self, node_id: str) -> int:
        """Chunks that this node's engine is taken to have."""
        return len(self._held.get(node_id, ()))

    def read(self, node_id: str, engine: EngineInfo, keys: Sequence[ChunkKey]) -> None:
        """This engine has had a prompt of these chunks. What it had longest ago is taken to be gone, ends before
        beginnings."""
        held = self._held.setdefault(node_id, OrderedDict())
        new = [key for key in keys if key not in held]
        for key in reversed(keys):
            held[key] = None
            held.move_to_end(key)
        self._index.store(node_id, new)
        room = int(self._share * engine.num_blocks * engine.block_size / engine.kv_spec.chunk_tokens)
        if len(held) > room:
            self._index.remove(node_id, [held.popitem(last=False)[0] for _ in range(len(held) - room)])

    def forget(self, node_id: str) -> None:
        """Its engine has started anew, or is away."""
        if self._held.pop(node_id, None) is not None:
            self._index.drop_node(node_id)

    def with_these(self, found: PrefixHits, keys: Sequence[ChunkKey]) -> PrefixHits:
        """The same hits, with the nodes whose engines hold more than their own memory does. What lies in no memory any
        more is not counted."""
        by_node = self._index.find(keys[: found.longest]).by_node if self._held and found.longest else {}
        if not by_node:
            return found
        for node_id, count in found.by_node.items():
            by_node[node_id] = max(count, by_node.get(node_id, 0))
        return replace(found, by_node=by_node)
