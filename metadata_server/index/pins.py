"""Which chunks are kept from eviction until a time, by their keys: those that lie in segments and those still to come.

Owns the pins and what they take. Pure. Invariants: a pinned key's complete replicas are held as long as all that is
held stays within its share; a replica is held once, whoever leases it besides.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Set

from kvcore.extents import aligned
from kvcore.types import ChunkKey
from metadata_server.index.chunks.rows import ReplicaTable


class Pins:
    """Mutated by CacheControl, and told by ReplicaIndex of every complete replica that comes or goes."""

    def __init__(self, max_pins: int, counts: Counter[str], table: ReplicaTable) -> None:
        self.most_bytes = 0
        """That may be held. What is held already stays when this shrinks with the cluster."""
        self.held_bytes = 0
        self._until: dict[ChunkKey, tuple[float, float]] = {}
        """And since when it is known here."""
        self._held: dict[int, None] = {}
        self._table = table
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
        return ((key, until) for key, (until, _) in self._until.items())

    def since(self) -> Iterator[tuple[ChunkKey, float]]:
        """Each key with the time at which this server came to know of its pin, the oldest pin first."""
        return ((key, since) for key, (_, since) in self._until.items())

    def end(self, key: ChunkKey) -> float:
        """When the key's pin ends; minus infinity: it has none."""
        return self._until[key][0] if key in self._until else -math.inf

    @property
    def held(self) -> Set[int]:
        """Rows that pins hold."""
        return self._held.keys()

    def pin(self, key: ChunkKey, until: float, rows: Iterable[int], now: float) -> bool:
        """Hold all the key's complete replicas until then. False: that would be more than may be held."""
        fresh = [row for row in rows if row not in self._held]
        new = sum(map(self._room_of, fresh))
        full = key not in self._until and len(self._until) >= self._max_pins
        if full or self.held_bytes + new > self.most_bytes:
            self._counts["pins_refused"] += 1
            return False
        self._until[key] = until, self._until[key][1] if key in self._until else now
        for row in fresh:
            self._hold(row)
        return True

    def unpin(self, key: ChunkKey, rows: Iterable[int]) -> list[int] | None:
        """End the key's pin. Returns the rows that are not held by it any more, each to be unpinned; None: it had
        none."""
        if self._until.pop(key, None) is None:
            return None
        return [row for row in rows if self._let_go(row)]

    def came(self, row: int) -> None:
        """It is complete, and in its segment."""
        if self._table.keys[row] not in self._until:
            return
        if self.held_bytes + self._room_of(row) > self.most_bytes:
            self._counts["pins_without_room"] += 1
        else:
            self._hold(row)

    def gone(self, row: int) -> None:
        """The replica is no longer there."""
        if self._let_go(row):
            self._table.unpin(row)

    def check(self, complete: dict[ChunkKey, tuple[int, ...]]) -> None:
        """Assert every invariant. `complete`: rows of complete replicas by key. For tests."""
        assert self.held_bytes == sum(map(self._room_of, self._held))
        for row in self._held:
            key = self._table.keys[row]
            assert key in self._until and row in complete[key] and row in self._table.pins

    def _hold(self, row: int) -> None:
        self._held[row] = None
        self.held_bytes += self._room_of(row)
        self._table.pin(row)

    def _let_go(self, row: int) -> bool:
        if row not in self._held:
            return False
        del self._held[row]
        self.held_bytes -= self._room_of(row)
        return True

    def _room_of(self, row: int) -> int:
        return aligned(self._table.lengths[row])


def pin_end(now: float, ttl_s: float | None) -> float:
    """When a pin ends that begins now."""
    return math.inf if ttl_s is None else now + ttl_s
