"""The router's own copy of the index: chunk key -> which segments hold it, as one integer of bits.

Owns nothing durable: it is fed by the metadata server's event stream and forgotten on a reset. Stale entries cost a
worse route, never a wrong answer. Keys lie in many small tables, by their first byte: a node's death only marks its
bits as dead, and each later change clears them out of one table, so that no step takes long. Invariant: a key's mask is
never 0, and has bits of known segments and dead ones only; no bit is given to a new segment before it is cleared.
"""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

import msgspec

from kvcore.types import ChunkKey


class PrefixHits(msgspec.Struct, frozen=True):
    """`by_node[n]`: how many leading chunks node n holds (absent: none). `longest`: how many leading chunks are
    somewhere, each perhaps on another node. `each_its_own`: a node has no use for what another one holds; `full`: some
    have to forget for what they compute. Behind the
    `longest`: `on_disk[n]`, how many lie on node n's disk, `in_shared`, in a tier that all nodes share, and `in_tiers`,
    in any of these."""

    longest: int = 0
    by_node: dict[str, int] = {}
    each_its_own: bool = False
    full: bool = False
    on_disk: dict[str, int] = {}
    in_shared: int = 0
    in_tiers: int = 0
    machine: str = ""
    """In whose memory the longest run of one node lies. Empty: of several, or not known."""

    def in_reach_of(self, node_id: str) -> int:
        """How many leading chunks the node need not compute."""
        return self.by_node.get(node_id, 0) if self.each_its_own else self.longest


KeptKeys = dict[tuple[bytes, int], list[ChunkKey]]
"""Keys of one prompt's usable chunks, by fingerprint and size of chunks: to hash a long prompt takes milliseconds."""
Slot = tuple[str, str]
"""A node, and a segment of it."""
_TABLES = 256
_MASKS_SHARED = 1 << 16
_FEW, _OWNERS_KEPT = 4, 256
"""Of more than so many bits the nodes are remembered, for so many masks: to name 1,000 takes a millisecond."""


class PrefixIndex:
    """Answers which node holds how much of a prefix. All methods are synchronous and idempotent."""

    def __init__(self, max_segments: int = 16_384) -> None:
        """Of more than `max_segments` at one time the latest are not listed: each lengthens the masks by a bit."""
        self._max_segments = max_segments
        self._clearing, self._tables_left = 0, 0
        self.reset()

    def __len__(self) -> int:
        """Keys that are listed, those of dead segments included until they are cleared."""
        return sum(map(len, self._tables))

    def __bool__(self) -> bool:
        """Whether any segment may hold something: asked once a request, when to look into each table takes longer than
        all else that is done with an empty index."""
        return bool(self._slots)

    def __repr__(self) -> str:
        return f"<PrefixIndex {len(self)} chunks on {len(self._bits)} segments>"

    def store(self, node_id: str, keys: Sequence[ChunkKey], segment_id: str = "") -> None:
        """`segment_id` of the node holds `keys` now."""
        self.sweep()
        mask = self._new_bit((node_id, segment_id))
        if not mask:
            return
        tables = self._tables
        for key in keys:
            masks = tables[key[0]]
            old = masks.get(key, 0)
            masks[key] = self._shared(old | mask) if old else mask

    def remove(self, node_id: str, keys: Sequence[ChunkKey], segment_id: str = "") -> None:
        """`segment_id` of the node holds `keys` no longer. Unknown keys are ignored."""
        self.sweep()
        mask = self._bits.get((node_id, segment_id), 0)
        tables = self._tables
        for key in keys:
            masks = tables[key[0]]
            old = masks.get(key, 0)
            left = old & ~mask
            if left:
                masks[key] = self._shared(left)
            elif old:
                del masks[key]

    def drop_node(self, node_id: str) -> None:
        """Forget all that the node's segments hold. They are found no more from now on; `sweep` clears them."""
        for (owner, segment_id), bit in list(self._bits.items()):
            if owner == node_id:
                self._alive &= ~bit
                self._owners.clear()
                del self._bits[owner, segment_id], self._slots[bit]

    def sweep(self) -> None:
        """Clear dead bits out of one table, if there are any: some milliseconds with 4 million keys."""
        # A pass goes through all tables with the bits that were dead when it began. Those that die meanwhile wait for
        # the next one. What was cleared stays so: nothing is stored under a dead bit.
        if not self._tables_left:
            if self._alive == -1:
                return
            self._clearing, self._tables_left = ~self._alive, _TABLES
        self._tables_left -= 1
        masks, keep = self._tables[self._tables_left], ~self._clearing
        shared = self._shared
        self._tables[self._tables_left] = {key: shared(left) for key, mask in masks.items() if (left := mask & keep)}
        if not self._tables_left:
            self._alive |= self._clearing
            for bit in _bits_of(self._clearing):
                heappush(self._free, bit.bit_length() - 1)

    def reset(self) -> None:
        """Forget everything."""
        self._tables: list[dict[ChunkKey, int]] = [{} for _ in range(_TABLES)]
        self._bits: dict[Slot, int] = {}
        self._slots: dict[int, Slot] = {}
        self._masks: dict[int, int] = {}
        """Masks of several bits that keys have, so that keys with the same ones share them."""
        self._owners: dict[int, tuple[str, ...]] = {}
        """The nodes of masks of many bits, while no bit comes or goes."""
        self._alive = -1
        """All bits but the dead ones."""
        self._free: list[int] = []
        """Places of bits that were given out and cleared, the lowest first."""
        self._num_given = 0
        self._clearing, self._tables_left = 0, 0

    def find(self, keys: Sequence[ChunkKey]) -> PrefixHits:
        """How much of the prefix `keys` is where. Stops at the first key that nobody holds."""
        # `unbroken`: the segments that hold every chunk so far. One that lacks a chunk leaves it, and its node's count
        # is the number of chunks before that one.
        by_node: dict[str, int] = {}
        tables, alive = self._tables, self._alive
        unbroken = 0
        longest = 0
        for key in keys:
            mask = tables[key[0]].get(key, 0) & alive
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

    def mask(self, key: ChunkKey) -> int:
        """What stands for the segments that hold it; 0: none does."""
        return self._tables[key[0]].get(key, 0) & self._alive

    def bit(self, slot: Slot) -> int:
        """What stands for a segment; 0: it holds nothing that is listed."""
        return self._bits.get(slot, 0)

    def slots(self, mask: int) -> set[Slot]:
        """The segments that a mask stands for."""
        return {self._slots[bit] for bit in _bits_of(mask)}

    def held_by(self, node_id: str, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """Those of `keys` that the node's segments hold."""
        own = 0
        for (owner, _), bit in self._bits.items():
            own |= bit if owner == node_id else 0
        return [key for key in keys if self._tables[key[0]].get(key, 0) & own]

    def _set_count(self, by_node: dict[str, int], bits: int, chunks: int) -> None:
        """`chunks`: no fewer than were set before."""
        if bits.bit_count() <= _FEW:
            for bit in _bits_of(bits):
                by_node[self._slots[bit][0]] = chunks
            return
        owners = self._owners.get(bits)
        if owners is None:
            if len(self._owners) >= _OWNERS_KEPT:
                self._owners.clear()
            owners = self._owners[bits] = tuple([self._slots[bit][0] for bit in _bits_of(bits)])
        by_node.update(dict.fromkeys(owners, chunks))

    def _shared(self, mask: int) -> int:
        """The same number, as the one object that all keys with it have: with 1,000 segments one takes 160 bytes."""
        known = self._masks.get(mask)
        if known is None:
            if len(self._masks) >= _MASKS_SHARED:
                self._masks.clear()
            known = self._masks[mask] = mask
        return known

    def _new_bit(self, slot: Slot) -> int:
        """The segment's bit; 0: there are too many segments."""
        bit = self._bits.get(slot)
        if bit is None:
            if self._num_given - len(self._free) >= self._max_segments:
                return 0
            if not self._free:
                heappush(self._free, self._num_given)
                self._num_given += 1
            bit = 1 << heappop(self._free)
            self._owners.clear()
            self._bits[slot] = bit
            self._slots[bit] = slot
        return bit


def _bits_of(mask: int) -> Iterator[int]:
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
