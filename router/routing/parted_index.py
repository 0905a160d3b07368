"""The router's copy of an index that several metadata servers share: a PrefixIndex a partition, looked at as one.

A key is looked for in its partition's own index, so that what one server says, and what becomes of it, touches no key
of the others. Invariant: a segment counts for a prefix as long as it holds each of its chunks, whoever knows of them.
"""

from collections.abc import Sequence

from kvcore.partitions import Partitions
from kvcore.types import ChunkKey
from router.routing.index import PrefixHits, PrefixIndex, Slot


class PartedIndex:
    """Asked as a PrefixIndex is. What changes is told to `parts`, in the order of the partitions."""

    def __init__(self, whole: Partitions) -> None:
        self._whole = whole
        self.parts = [PrefixIndex() for _ in whole.names]

    def __len__(self) -> int:
        """Keys that are listed."""
        return sum(map(len, self.parts))

    def __bool__(self) -> bool:
        return any(map(bool, self.parts))

    def __repr__(self) -> str:
        return f"<PartedIndex {', '.join(map(repr, self.parts))}>"

    def drop_node(self, node_id: str) -> None:
        """Forget all that the node's segments hold, whoever has told of it."""
        for part in self.parts:
            part.drop_node(node_id)

    def sweep(self) -> None:
        """See PrefixIndex.sweep."""
        for part in self.parts:
            part.sweep()

    def find(self, keys: Sequence[ChunkKey]) -> PrefixHits:
        """See PrefixIndex.find."""
        # `unbroken`: the segments that hold every chunk so far, and `bits[n]` what stands for them in partition n. A
        # segment that has nothing there has no bit, and is broken by the first key that is that partition's.
        by_node: dict[str, int] = {}
        unbroken: set[Slot] = set()
        bits: list[tuple[int, bool]] = []
        longest = 0
        for key, number in zip(keys, self._whole.numbers_of(keys), strict=True):
            mask = self.parts[number].mask(key)
            if not mask:
                break
            if longest == 0:
                unbroken = self.parts[number].slots(mask)
                bits = self._bits(unbroken)
            else:
                wanted, all_known = bits[number]
                if wanted & ~mask or not all_known:
                    left = unbroken & self.parts[number].slots(mask)
                    _count(by_node, unbroken - left, longest)
                    unbroken, bits = left, self._bits(left)
            longest += 1
        _count(by_node, unbroken, longest)
        return PrefixHits(longest, by_node)

    def held_by(self, node_id: str, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """See PrefixIndex.held_by. In the order of the partitions."""
        return [key for part in self.parts for key in part.held_by(node_id, keys)]

    def _bits(self, slots: set[Slot]) -> list[tuple[int, bool]]:
        """For each partition what stands for these segments there, and whether all of them have something there."""
        found = [[part.bit(slot) for slot in slots] for part in self.parts]
        return [(sum(bits), all(bits)) for bits in found]


def _count(by_node: dict[str, int], slots: set[Slot], chunks: int) -> None:
    for node_id, _ in slots:
        by_node[node_id] = max(by_node.get(node_id, 0), chunks)
