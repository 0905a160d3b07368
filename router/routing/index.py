"""The router's own copy of the index: chunk key -> which segments hold it, as one integer of bits.

Owns nothing durable: it is fed by the metadata server's event stream and forgotten on a reset. Stale entries cost a
worse route, never a wrong answer. Invariant: a key's mask is never 0, and has bits of known segments only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvcore.types import ChunkKey


@dataclass(frozen=True, slots=True)
class PrefixHits:
    """`by_node[n]`: how many leading chunks node n holds (absent: none). `longest`: how many leading chunks are
    somewhere, each perhaps on another node."""

    longest: int = 0
    by_node: dict[str, int] = field(default_factory=dict)


class PrefixIndex:
    """Answers which node holds how much of a prefix. All methods are synchronous and idempotent."""

    def __init__(self) -> None:
        self._masks: dict[ChunkKey, int] = {}
        self._bits: dict[tuple[str, str], int] = {}
        self._owners: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"<PrefixIndex {len(self._masks)} chunks on {len(self._bits)} segments>"

    def store(self, node_id: str, keys: Sequence[ChunkKey], segment_id: str = "") -> None:
        """`segment_id` of the node holds `keys` now."""
        mask = self._bit((node_id, segment_id))
        masks = self._masks
        get = masks.get
        for key in keys:
            masks[key] = get(key, 0) | mask

    def remove(self, node_id: str, keys: Sequence[ChunkKey], segment_id: str = "") -> None:
        """`segment_id` of the node holds `keys` no longer. Unknown keys are ignored."""
        mask = self._bits.get((node_id, segment_id), 0)
        masks = self._masks
        for key in keys:
            old = masks.get(key, 0)
            left = old & ~mask
            if left:
                masks[key] = left
            elif old:
                del masks[key]

    def drop_node(self, node_id: str) -> None:
        """Forget all that the node's segments hold. Scans the whole index: nodes die rarely."""
        gone = 0
        for (owner, segment_id), bit in list(self._bits.items()):
            if owner == node_id:
                gone |= bit
                del self._bits[owner, segment_id], self._owners[bit]
        if gone:
            self._masks = {key: left for key, mask in self._masks.items() if (left := mask & ~gone)}

    def reset(self) -> None:
        """Forget everything."""
        self._masks, self._bits, self._owners = {}, {}, {}

    def find(self, keys: Sequence[ChunkKey]) -> PrefixHits:
        """How much of the prefix `keys` is where. Stops at the first key that nobody holds."""
        # `unbroken`: the segments that hold every chunk so far. One that lacks a chunk leaves it, and its node's count
        # is the number of chunks before that one.
        by_node: dict[str, int] = {}
        masks = self._masks
        unbroken = 0
        longest = 0
        for key in keys:
            mask = masks.get(key, 0)
            if not mask:
                break
            if longest == 0:
                unbroken = mask
            elif broken := unbroken & ~mask:
                self._set_count(by_node, broken, longest)
                unbroken &= mask
            longest += 1
        if longest:
            self._set_count(by_node, unbroken, longest)
        return PrefixHits(longest, by_node)

    def held_by(self, node_id: str, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """Those of `keys` that the node's segments hold."""
        own = 0
        for (owner, _), bit in self._bits.items():
            own |= bit if owner == node_id else 0
        return [key for key in keys if self._masks.get(key, 0) & own]

    def _set_count(self, by_node: dict[str, int], bits: int, chunks: int) -> None:
        while bits:
            bit = bits & -bits
            owner = self._owners[bit]
            by_node[owner] = max(by_node.get(owner, 0), chunks)
            bits ^= bit

    def _bit(self, slot: tuple[str, str]) -> int:
        bit = self._bits.get(slot)
        if bit is None:
            bit = 1
            while bit in self._owners:
                bit <<= 1
            self._bits[slot] = bit
            self._owners[bit] = slot[0]
        return bit
