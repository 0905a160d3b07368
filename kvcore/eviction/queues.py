"""The policies that keep one order: least recently used, first in first out, least frequently used."""

import heapq
from collections import OrderedDict
from typing import Generic

from kvcore.eviction.base import K


class Lru(Generic[K]):
    """Least recently used."""

    def __init__(self) -> None:
        self._queue: OrderedDict[K, None] = OrderedDict()
        """The next to go first. A plain dict takes 25 us to find its first entry when many are gone."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._queue)}>"

    def add(self, key: K) -> None:
        """See `EvictionPolicy`."""
        self._queue[key] = None

    def use(self, key: K) -> None:
        """See `EvictionPolicy`."""
        self._queue.move_to_end(key)

    def refresh(self, key: K) -> None:
        """See `EvictionPolicy`."""
        self._queue.move_to_end(key)

    def remove(self, key: K) -> None:
        """See `EvictionPolicy`."""
        del self._queue[key]

    def take(self) -> tuple[K, int] | None:
        """See `EvictionPolicy`."""
        return (self._queue.popitem(last=False)[0], 0) if self._queue else None

    def put_back(self, key: K, place: int) -> None:
        """See `EvictionPolicy`."""
        self._queue[key] = None
        self._queue.move_to_end(key, last=False)

    def evicted(self, key: K, place: int) -> None:
        """See `EvictionPolicy`."""


class Fifo(Lru[K]):
    """First in, first out: uses count for nothing."""

    def use(self, key: K) -> None:
        """See `EvictionPolicy`."""

    def refresh(self, key: K) -> None:
        """See `EvictionPolicy`."""


class Lfu(Generic[K]):
    """Fewest uses; among equals the one that has had so many for longest. Counts begin at 1 and never age."""

    def __init__(self) -> None:
        self._uses: dict[K, int] = {}
        self._queues: dict[int, OrderedDict[K, None]] = {}
        """Uses -> who has so many; none is empty."""
        self._counts: list[int] = []
        """A heap of the keys of `_queues`, and of some that it had."""

    def __repr__(self) -> str:
        return f"<Lfu {len(self._uses)}>"

    def add(self, key: K) -> None:
        """See `EvictionPolicy`."""
        self._put(key, 1)

    def use(self, key: K) -> None:
        """See `EvictionPolicy`."""
        uses = self._uses[key]
        self.remove(key)
        self._put(key, uses + 1)

    def refresh(self, key: K) -> None:
        """See `EvictionPolicy`."""

    def remove(self, key: K) -> None:
        """See `EvictionPolicy`."""
        uses = self._uses.pop(key)
        queue = self._queues[uses]
        del queue[key]
        if not queue:
            del self._queues[uses]

    def take(self) -> tuple[K, int] | None:
        """See `EvictionPolicy`."""
        while self._counts and self._counts[0] not in self._queues:
            heapq.heappop(self._counts)
        if not self._counts:
            return None
        uses = self._counts[0]
        key = next(iter(self._queues[uses]))
        self.remove(key)
        return key, uses

    def put_back(self, key: K, place: int) -> None:
        """See `EvictionPolicy`."""
        self._put(key, place)
        self._queues[place].move_to_end(key, last=False)

    def evicted(self, key: K, place: int) -> None:
        """See `EvictionPolicy`."""

    def _put(self, key: K, uses: int) -> None:
        self._uses[key] = uses
        queue = self._queues.get(uses)
        if queue is None:
            queue = self._queues[uses] = OrderedDict()
            heapq.heappush(self._counts, uses)
        queue[key] = None
