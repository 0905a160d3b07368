"""What lies in tiers, behind what lies in memory: on nodes' disks, as the metadata server tells, and in a tier that all
nodes share, where what went out of memory is taken to be.

Owns the guess of what is shared, which is bounded: a wrong one costs an expectation, and is forgotten when it shows.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from msgspec.structs import replace

from kvcore.config.tiers import TiersConfig
from kvcore.partitions import Partitions
from kvcore.types import ChunkKey
from metadata_server.messages import Event, EventKind
from router.routing.index import PrefixHits, PrefixIndex
from router.routing.parted_index import PartedIndex


class TierIndex:
    """Fed with the metadata server's events, each with the number of its partition."""

    def __init__(self, tiers: TiersConfig, partitions: Sequence[str] = (), *, most_remembered: int = 131_072) -> None:
        """`most_remembered`: chunks that went out of memory, about 120 bytes each."""
        self._disks: PrefixIndex | PartedIndex = (
            PartedIndex(Partitions(tuple(partitions))) if partitions else PrefixIndex()
        )
        self._parts = self._disks.parts if isinstance(self._disks, PartedIndex) else [self._disks]
        shared = [one for one in (tiers.redis, tiers.object, tiers.mooncake) if one is not None]
        takes_all = any(one.admission == "always" and one.ttl_s is None for one in shared)
        self._most = most_remembered if takes_all else 0
        self._shared: OrderedDict[ChunkKey, None] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._disks) or bool(self._shared)

    def __repr__(self) -> str:
        return f"<TierIndex of {len(self._disks)} chunks on disks, {len(self._shared)} where all see them>"

    def on_event(self, event: Event, part: int = 0) -> None:
        """A change, in order."""
        disks = self._parts[part]
        match event.kind:
            case EventKind.ON_DISK:
                disks.store(event.node_id, event.keys)
            case EventKind.OFF_DISK if event.keys:
                disks.remove(event.node_id, event.keys)
            case EventKind.OFF_DISK | EventKind.NODE_DOWN:
                disks.drop_node(event.node_id)
            case EventKind.REMOVED if self._most:
                for key in event.keys:
                    self._shared[key] = None
                    self._shared.move_to_end(key)
                while len(self._shared) > self._most:
                    self._shared.popitem(last=False)

    def reset(self, part: int = 0) -> None:
        """Forget what a partition told of disks."""
        self._parts[part].reset()

    def missed(self, keys: Iterable[ChunkKey]) -> None:
        """No tier had them."""
        for key in keys:
            self._shared.pop(key, None)

    def behind(self, found: PrefixHits, keys: Sequence[ChunkKey]) -> PrefixHits:
        """The same hits, with what tiers have behind the last chunk that is in memory."""
        rest = keys[found.longest :]
        if not (self and rest):
            return found
        on_disk = self._disks.find(rest)
        shared = self._num_shared(rest)
        number = more = max(on_disk.longest, shared)
        while more:  # prompts that grew on several nodes lie on the disks of several
            more = max(self._disks.find(rest[number:]).longest, self._num_shared(rest[number:]))
            number += more
        return replace(found, on_disk=on_disk.by_node, in_shared=shared, in_tiers=number)

    def _num_shared(self, keys: Sequence[ChunkKey]) -> int:
        return next((number for number, key in enumerate(keys) if key not in self._shared), len(keys))
