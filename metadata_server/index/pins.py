"""Which chunks are kept from eviction until a time, by their keys: those that lie in segments and those still to come.

Owns the pins and what they take. Pure. Invariants: a pinned key's complete replicas are held as long as all that is
held stays within its share; a replica is held once, whoever leases it besides.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Set

from kvcore.types import ChunkKey
from metadata_server.index.segments import Replica


class Pins:
    """Mutated by CacheControl, and told by ReplicaIndex of every complete replica that comes or goes."""

    def __init__(self, max_pins: int, counts: Counter[str]) -> None:
        self.most_bytes = 0
        """That may be held. What is held already stays when this shrinks with the cluster."""
        self.held_bytes = 0
        self._until: dict[ChunkKey, float] = {}
        self._held: dict[int, Replica] = {}
        self._max_pins = max_pins
        self._counts = counts

    def __len__(self) -> int:
        return len(self._until)

    def __repr__(self) -> str:
        return f"<Pins of {len(self)} keys: {len(self._held)} replicas, {self.held_bytes} of {self.most_bytes} bytes>"

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._until

    def __iter__(self) -> Iterator[tuple[ChunkKey, float]]:
        """Each key with the time at which its pin ends (infinity: never), the oldest pin first."""
        return iter(self._until.items())

    def end(self, key: ChunkKey) -> float:
        """When the key's pin ends; minus infinity: it has none."""
        return self._until.get(key, -math.inf)

    @property
    def held(self) -> Set[int]:
        """Ids of the replicas that pins hold."""
        return self._held.keys()

    def pin(self, key: ChunkKey, until: float, replicas: Iterable[Replica]) -> bool:
        """Hold all the key's complete replicas until then. False: that would be more than may be held."""
        fresh = [replica for replica in replicas if replica.ref.id not in self._held]
        new = sum(replica.room_bytes for replica in fresh)
        full = key not in self._until and len(self._until) >= self._max_pins
        if full or self.held_bytes + new > self.most_bytes:
            self._counts["pins_refused"] += 1
            return False
        self._until[key] = until
        for replica in fresh:
            self._hold(replica)
        return True

    def unpin(self, key: ChunkKey, replicas: Iterable[Replica]) -> bool:
        """End the key's pin. False: it had none."""
        if self._until.pop(key, None) is None:
            return False
        for replica in replicas:
            if replica.ref.id in self._held:
                self.gone(replica)
                replica.record.unpin(replica)
        return True

    def came(self, replica: Replica) -> None:
        """It is complete, and in its segment."""
        if replica.ref.key not in self._until:
            return
        if self.held_bytes + replica.room_bytes > self.most_bytes:
            self._counts["pins_without_room"] += 1
        else:
            self._hold(replica)

    def gone(self, replica: Replica) -> None:
        """It is not held any more, whatever became of it."""
        if self._held.pop(replica.ref.id, None) is not None:
            self.held_bytes -= replica.room_bytes

    def check(self, complete: dict[ChunkKey, tuple[Replica, ...]]) -> None:
        """Assert every invariant. For tests."""
        assert self.held_bytes == sum(replica.room_bytes for replica in self._held.values())
        for replica in self._held.values():
            assert replica.ref.key in self._until and replica in complete[replica.ref.key] and replica.pins > 0

    def _hold(self, replica: Replica) -> None:
        self._held[replica.ref.id] = replica
        self.held_bytes += replica.room_bytes
        replica.record.pin(replica)


def pin_end(now: float, ttl_s: float | None) -> float:
    """When a pin ends that begins now."""
    return math.inf if ttl_s is None else now + ttl_s
