"""The policies with ghosts: keys of what went, by which they learn whether it should have stayed.

ARC: N. Megiddo, D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. S3-FIFO: J. Yang, Y.
Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023. Sizes are in entries,
and the size of the cache is what is in it now, as segments and slabs decide when room is needed, not the policy.
"""

from collections import OrderedDict
from typing import Generic

from kvcore.eviction.base import K


class Arc(Generic[K]):
    """T1: used once lately; T2: used more than once; B1, B2: keys of what went from them. A key that comes back while
    it is in B1 says that T1 is too short, one in B2 that T2 is.

    Unlike in the paper an entry goes before it is known who comes, so B2's tie ("x in B2 and |T1| = p") does not count.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[K, None] = OrderedDict()
        self._frequent: OrderedDict[K, None] = OrderedDict()
        self._recent_ghosts: OrderedDict[K, None] = OrderedDict()
        self._frequent_ghosts: OrderedDict[K, None] = OrderedDict()
        self._target = 0.0
        """`p`: how long T1 is to be."""

    def __repr__(self) -> str:
        return f"<Arc {len(self._recent)} recent of {self._target:.0f}, {len(self._frequent)} frequent>"

    def add(self, key: K) -> None:
        """See `EvictionPolicy`."""
        recent, frequent = len(self._recent_ghosts), len(self._frequent_ghosts)
        if key in self._recent_ghosts:
            self._target = min(float(self._size + 1), self._target + max(frequent / recent, 1.0))
            del self._recent_ghosts[key]
            self._frequent[key] = None
        elif key in self._frequent_ghosts:
            self._target = max(0.0, self._target - max(recent / frequent, 1.0))
            del self._frequent_ghosts[key]
            self._frequent[key] = None
        else:
            self._recent[key] = None

    def use(self, key: K) -> None:
        """See `EvictionPolicy`."""
        if key in self._recent:
            del self._recent[key]
            self._frequent[key] = None
        else:
            self._frequent.move_to_end(key)

    def refresh(self, key: K) -> None:
        """See `EvictionPolicy`."""
        (self._recent if key in self._recent else self._frequent).move_to_end(key)

    def remove(self, key: K) -> None:
        """See `EvictionPolicy`."""
        del (self._recent if key in self._recent else self._frequent)[key]

    def take(self) -> tuple[K, int] | None:
        """See `EvictionPolicy`. The paper's REPLACE."""
        if self._recent and (len(self._recent) > self._target or not self._frequent):
            return self._recent.popitem(last=False)[0], 1
        return (self._frequent.popitem(last=False)[0], 2) if self._frequent else None

    def put_back(self, key: K, place: int) -> None:
        """See `EvictionPolicy`."""
        queue = self._recent if place == 1 else self._frequent
        queue[key] = None
        queue.move_to_end(key, last=False)

    def evicted(self, key: K, place: int) -> None:
        """See `EvictionPolicy`. |T1| + |B1| stays within the cache's size, all four lists within twice that."""
        (self._recent_ghosts if place == 1 else self._frequent_ghosts)[key] = None
        size = self._size + 1
        while self._recent_ghosts and len(self._recent) + len(self._recent_ghosts) > size:
            self._recent_ghosts.popitem(last=False)
        while self._frequent_ghosts and len(self._recent_ghosts) + len(self._frequent_ghosts) > size:
            self._frequent_ghosts.popitem(last=False)

    @property
    def _size(self) -> int:
        return len(self._recent) + len(self._frequent)


class S3Fifo(Generic[K]):
    """New entries wait in a small queue, a tenth of all; those used more than once meanwhile go on to the main queue,
    the others go, and leave a ghost: with one, an entry that comes back begins in the main queue. There each use, three
    at most, is one more round.
    """

    def __init__(self, *, small_share: float = 0.1) -> None:
        self._small: OrderedDict[K, int] = OrderedDict()
        """The oldest first -> uses, three at most. So is the main queue."""
        self._main: OrderedDict[K, int] = OrderedDict()
        self._ghosts: OrderedDict[K, None] = OrderedDict()
        self._small_share = small_share

    def __repr__(self) -> str:
        return f"<S3Fifo {len(self._small)} in the small queue, {len(self._main)} in the main one>"

    def add(self, key: K) -> None:
        """See `EvictionPolicy`."""
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def use(self, key: K) -> None:
        """See `EvictionPolicy`."""
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, 3)

    def refresh(self, key: K) -> None:
        """See `EvictionPolicy`."""

    def remove(self, key: K) -> None:
        """See `EvictionPolicy`."""
        del (self._small if key in self._small else self._main)[key]

    def take(self) -> tuple[K, int] | None:
        """See `EvictionPolicy`."""
        while self._small or self._main:
            if self._small and (not self._main or len(self._small) >= self._small_share * self._size):
                key, uses = self._small.popitem(last=False)
                if uses <= 1:
                    return key, uses << 1
                self._main[key] = 0
            else:
                key, uses = self._main.popitem(last=False)
                if uses == 0:
                    return key, 1
                self._main[key] = uses - 1
        return None

    def put_back(self, key: K, place: int) -> None:
        """See `EvictionPolicy`. The place is the number of uses, and in its last bit the queue."""
        queue = self._main if place & 1 else self._small
        queue[key] = place >> 1
        queue.move_to_end(key, last=False)

    def evicted(self, key: K, place: int) -> None:
        """See `EvictionPolicy`. There are as many ghosts as the main queue is to hold."""
        if place & 1:
            return
        self._ghosts[key] = None
        while len(self._ghosts) > (1 - self._small_share) * (self._size + 1):
            self._ghosts.popitem(last=False)

    @property
    def _size(self) -> int:
        return len(self._small) + len(self._main)
