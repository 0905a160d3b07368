"""What lies on the nodes' own disks, as they tell it. Soft state: it says whom to ask, and may be out of date.

Owns which node holds which key, as one integer of bits a key. Invariant: no bit belongs to a node that is gone.
"""

from collections.abc import Iterable, Sequence

from kvcore.types import ChunkKey
from metadata_server.index.nodes import NodeRegistry
from metadata_server.messages import FindHoldersReply, TellHoldingsRequest


class TierHoldings:
    """Mutated by MetadataState only."""

    def __init__(self, max_keys: int) -> None:
        """Of more than `max_keys` keys the latest are not noted: their chunks are computed."""
        self._max_keys = max_keys
        self._masks: dict[ChunkKey, int] = {}
        self._bits: dict[str, int] = {}
        self._nodes: list[str | None] = []

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"<TierHoldings {len(self)} keys on the disks of {len(self._bits)} nodes>"

    def note(self, request: TellHoldingsRequest) -> None:
        """See TellHoldingsRequest; of a live node."""
        if request.reset:
            self.drop(request.node_id)
        self.remove(request.node_id, request.removed)
        self.add(request.node_id, request.added)

    def reply(self, keys: Sequence[ChunkKey], nodes: NodeRegistry) -> FindHoldersReply:
        """Who has each, as `find`."""
        holders = self.find(keys)
        names = sorted({name for having in holders for name in having})
        numbers = {name: number for number, name in enumerate(names)}
        infos = [nodes[name].info for name in names]
        return FindHoldersReply(nodes=infos, holders=[[numbers[name] for name in having] for having in holders])

    def add(self, node_id: str, keys: Iterable[ChunkKey]) -> None:
        """They came to the node's disk."""
        bit = 1 << self._bit(node_id)
        for key in keys:
            mask = self._masks.get(key, 0)
            if mask or len(self._masks) < self._max_keys:
                self._masks[key] = mask | bit

    def remove(self, node_id: str, keys: Iterable[ChunkKey]) -> None:
        """They left the node's disk."""
        if node_id in self._bits:
            self._clear(1 << self._bits[node_id], keys)

    def holders(self) -> list[str]:
        """Nodes that have told of chunks on their disks."""
        return list(self._bits)

    def drop(self, node_id: str) -> None:
        """The node is gone, or will say anew what it has."""
        number = self._bits.pop(node_id, None)
        if number is not None:
            self._clear(1 << number, list(self._masks))
            self._nodes[number] = None

    def find(self, keys: Sequence[ChunkKey]) -> list[list[str]]:
        """Who has each, for the keys up to the first that nobody has."""
        found = []
        for key in keys:
            mask = self._masks.get(key)
            if mask is None:
                break
            found.append([name for number, name in enumerate(self._nodes) if name is not None and mask >> number & 1])
        return found

    def _bit(self, node_id: str) -> int:
        number = self._bits.get(node_id)
        if number is None:
            number = self._nodes.index(None) if None in self._nodes else len(self._nodes)
            self._nodes[number : number + 1] = [node_id]
            self._bits[node_id] = number
        return number

    def _clear(self, bit: int, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            mask = self._masks.get(key, 0)
            if mask & bit:
                if mask == bit:
                    del self._masks[key]
                else:
                    self._masks[key] = mask ^ bit
