"""What lies on the nodes' own disks, as they tell it. Soft state: it says whom to ask, and may be out of date.
What is noted is told to subscribers (`EventKind.ON_DISK`, `OFF_DISK`); that a node is gone says NODE_DOWN.

Owns which node holds which key, as one integer of bits a key. Keys lie in many small tables, by their first byte: when
a node is gone its bit only counts as dead, and `sweep` clears dead bits out of one table at a time. Invariant: no bit
is given to another node before it is cleared everywhere.
"""

from collections.abc import Iterable, Iterator, Sequence

from kvcore.types import ChunkKey
from metadata_server.index.event_log import EventLog
from metadata_server.index.limits import IndexLimits
from metadata_server.index.nodes import NodeRegistry
from metadata_server.messages import EventKind, FindHoldersReply, TellHoldingsRequest

_TABLES = 256


class TierHoldings:
    """Mutated by MetadataState only."""

    def __init__(self, limits: IndexLimits) -> None:
        """Of more than `max_tier_keys` keys, or `max_tier_keys_of_node` of one node, the latest are not noted: their
        chunks are computed. `most_swept`: so many are cleared in one go."""
        self._max_keys, self._max_keys_of_node = limits.max_tier_keys, limits.max_tier_keys_of_node
        self._held: dict[str, int] = {}
        """Keys of each node."""
        self._most_swept = limits.most_swept
        self._tables: list[dict[ChunkKey, int]] = [{} for _ in range(_TABLES)]
        self._num_keys = 0
        self._bits: dict[str, int] = {}
        self._nodes: list[str | None] = []
        self._alive = -1
        """All bits but the dead ones."""
        self._clearing, self._tables_left = 0, 0

    def __len__(self) -> int:
        return self._num_keys

    def __repr__(self) -> str:
        return f"<TierHoldings {len(self)} keys on the disks of {len(self._bits)} nodes>"

    def note(self, request: TellHoldingsRequest, log: EventLog) -> None:
        """See TellHoldingsRequest; of a live node."""
        name = request.node_id
        if request.reset and name in self._bits:
            self.drop(name)
            log.append(EventKind.OFF_DISK, name)
        if left := self.remove(name, request.removed):
            log.append(EventKind.OFF_DISK, name, keys=left)
        if came := self.add(name, request.added):
            log.append(EventKind.ON_DISK, name, keys=came)

    def told(self) -> Iterator[tuple[str, list[ChunkKey]]]:
        """(node, keys on its disk) a table at a time, each as it is when it is asked for."""
        for masks in iter(self._tables):
            found: dict[str, list[ChunkKey]] = {}
            for key, mask in masks.items():
                for name in self._names_of(mask & self._alive):
                    found.setdefault(name, []).append(key)
            yield from found.items()

    def reply(self, keys: Sequence[ChunkKey], nodes: NodeRegistry) -> FindHoldersReply:
        """Who has each, as `find`."""
        holders = self.find(keys)
        names = sorted({name for having in holders for name in having})
        numbers = {name: number for number, name in enumerate(names)}
        infos = [nodes[name].info for name in names]
        return FindHoldersReply(nodes=infos, holders=[[numbers[name] for name in having] for having in holders])

    def add(self, node_id: str, keys: Iterable[ChunkKey]) -> list[ChunkKey]:
        """They came to the node's disk. Those that are noted, and were not."""
        bit = 1 << self._bit(node_id)
        held, came = self._held.get(node_id, 0), list[ChunkKey]()
        for key in keys:
            masks = self._tables[key[0]]
            mask = masks.get(key, 0)
            if mask & bit or held >= self._max_keys_of_node:
                continue
            if mask or self._num_keys < self._max_keys:
                self._num_keys += not mask
                masks[key] = mask | bit
                held += 1
                came.append(key)
        self._held[node_id] = held
        return came

    def remove(self, node_id: str, keys: Iterable[ChunkKey]) -> list[ChunkKey]:
        """They left the node's disk. Those that had been noted."""
        if node_id not in self._bits:
            return []
        bit, left = 1 << self._bits[node_id], list[ChunkKey]()
        keep = ~bit
        for key in keys:
            masks = self._tables[key[0]]
            mask = masks.get(key, 0)
            if mask & bit:
                self._held[node_id] -= 1
                left.append(key)
            if mask & keep:
                masks[key] = mask & keep
            elif mask:
                del masks[key]
                self._num_keys -= 1
        return left

    def holders(self) -> list[str]:
        """Nodes that have told of chunks on their disks."""
        return list(self._bits)

    def drop(self, node_id: str) -> None:
        """The node is gone, or will say anew what it has."""
        number = self._bits.pop(node_id, None)
        if number is not None:
            self._nodes[number] = None
            self._held.pop(node_id, None)
            self._alive &= ~(1 << number)
            while self._num_keys <= self._most_swept and self.sweep():
                pass

    def sweep(self) -> bool:
        """Clear dead bits out of one table; whether there is more to clear."""
        # A pass clears what was dead when it began. Bits that die meanwhile wait for the next one.
        if not self._tables_left:
            if self._alive == -1:
                return False
            self._clearing, self._tables_left = ~self._alive, _TABLES
        self._tables_left -= 1
        masks, keep = self._tables[self._tables_left], ~self._clearing
        left = {key: rest for key, mask in masks.items() if (rest := mask & keep)}
        self._num_keys -= len(masks) - len(left)
        self._tables[self._tables_left] = left
        if not self._tables_left:
            self._alive |= self._clearing
        return self._tables_left > 0 or self._alive != -1

    def find(self, keys: Sequence[ChunkKey]) -> list[list[str]]:
        """Who has each, for the keys up to the first that nobody has."""
        found = []
        for key in keys:
            mask = self._tables[key[0]].get(key, 0) & self._alive
            if not mask:
                break
            found.append(self._names_of(mask))
        return found

    def _names_of(self, mask: int) -> list[str]:
        names = []
        while mask:  # the holders alone: there may be a thousand nodes
            lowest = mask & -mask
            name = self._nodes[lowest.bit_length() - 1]
            if name is not None:
                names.append(name)
            mask ^= lowest
        return names

    def _bit(self, node_id: str) -> int:
        number = self._bits.get(node_id)
        if number is None:
            free = (at for at, name in enumerate(self._nodes) if name is None and self._alive >> at & 1)
            number = next(free, len(self._nodes))
            self._nodes[number : number + 1] = [node_id]
            self._bits[node_id] = number
        return number
