"""What people and hints say of chunks by their keys: pin, unpin, evict, forget after a time. Pure.

Owns the deadlines of pins and of single chunks. Invariants: a pin with an end has a deadline; what is pinned or leased
is neither evicted nor forgotten.
"""

import math
from collections import Counter
from collections.abc import Iterable

from kvcore.config.schema import StoreConfig
from kvcore.types import ChunkKey
from metadata_server.cache_messages import (
    CacheReply,
    EvictRequest,
    ExpireRequest,
    Pin,
    PinRequest,
    PinsReply,
    UnpinRequest,
)
from metadata_server.index.chunks.replicas import ReplicaIndex
from metadata_server.index.leases import Deadlines, Expiry
from metadata_server.index.limits import IndexLimits
from metadata_server.index.nodes import NodeRegistry
from metadata_server.index.pins import Pins, pin_end


class CacheControl:
    """Mutated by MetadataState only, which lets run out what is due before each call."""

    def __init__(
        self,
        nodes: NodeRegistry,
        index: ReplicaIndex,
        *,
        config: StoreConfig,
        pins: Pins,
        deadlines: Deadlines,
        counts: Counter[str],
        limits: IndexLimits,
    ) -> None:
        """`pins` are the index's."""
        self._pin_share, self._ttl_s = config.pin_share, config.ttl_s
        self._nodes = nodes
        self._index = index
        self._pins = pins
        self._deadlines = deadlines
        self._counts = counts
        self._limits = limits
        self._overdue: set[ChunkKey] = set()
        """Pinned chunks whose time is up: they go with their pin."""

    def __repr__(self) -> str:
        return f"<CacheControl {self._pins}>"

    def room_changed(self) -> None:
        """Segments came or went."""
        self._pins.most_bytes = int(self._pin_share * self._index.rooms.size_bytes)

    def pin(self, request: PinRequest, now: float) -> CacheReply:
        """See PinRequest. In the order of the keys: where there is no room for all, a prefix is pinned."""
        until = pin_end(now, request.ttl_s)
        done = 0
        keys = list(dict.fromkeys(request.keys))
        for key in keys:
            end = max(until, self._pins.end(key)) if request.extend else until
            if not self._pins.pin(key, end, self._index.rows(key), now):
                break
            done += 1
            if end < math.inf:
                self._deadlines.set((Expiry.PIN, key), end)
            else:
                self._deadlines.drop((Expiry.PIN, key))
        return CacheReply(known=len(self._there(keys)), done=done, refused=len(keys) - done)

    def unpin(self, request: UnpinRequest, now: float) -> CacheReply:
        """See UnpinRequest."""
        done = sum(self.end_pin(key, now) for key in reversed(request.keys))  # of a prefix the tail is to go first
        self._index.publish()
        return CacheReply(known=done, done=done, refused=0)

    def end_pin(self, key: ChunkKey, now: float) -> bool:
        """Its time is up, or nobody wants it any more. False: it was not pinned."""
        self._deadlines.drop((Expiry.PIN, key))
        rows = self._pins.unpin(key, self._index.rows(key))
        self._index.unpin(rows or ())
        if key in self._overdue:
            self._overdue.discard(key)
            self.end_chunk(key, now)
        return rows is not None

    def evict(self, request: EvictRequest) -> CacheReply:
        """See EvictRequest. A chunk with a replica that is in use keeps that one."""
        there = self._there(request.keys)
        refused = sum(not self._forget(key) for key in reversed(there))
        self._index.publish()
        return CacheReply(known=len(there), done=len(there) - refused, refused=refused)

    def expire(self, request: ExpireRequest, now: float) -> CacheReply:
        """See ExpireRequest."""
        there = self._there(request.keys)
        for key in there:
            self._overdue.discard(key)
            self._deadlines.set((Expiry.CHUNK, key), now + request.ttl_s)
        return CacheReply(known=len(there), done=len(there), refused=0)

    def stored(self, keys: Iterable[ChunkKey], now: float) -> None:
        """These lie in a segment from now on, or were found there: their time begins, if chunks have one."""
        if self._ttl_s is not None:
            for key in keys:
                self._overdue.discard(key)
                self._deadlines.set((Expiry.CHUNK, key), now + self._ttl_s)

    def end_chunk(self, key: ChunkKey, now: float) -> None:
        """The chunk's time is up. One that is in use goes when it no longer is."""
        if key in self._pins:
            self._overdue.add(key)
        elif not self._forget(key):
            self._deadlines.set((Expiry.CHUNK, key), now + self._limits.forget_again_s)

    def listed(self, now: float) -> PinsReply:
        """What is pinned."""
        pins: list[Pin] = []
        for key, until in self._pins:
            if len(pins) == self._limits.max_listed_pins:
                break
            replicas = sum(row in self._pins.held for row in self._index.rows(key))
            pins.append(Pin(key=key, left_s=until - now if until < math.inf else None, replicas=replicas))
        return PinsReply(
            num_pins=len(self._pins),
            pinned_bytes=self._pins.held_bytes,
            most_bytes=self._pins.most_bytes,
            pins=pins,
        )

    def check(self) -> None:
        """Assert every invariant. For tests."""
        self._pins.check({key: self._index.rows(key) for key in list(self._index.complete)})
        for key, until in self._pins:
            assert ((Expiry.PIN, key) in self._deadlines) == (until < math.inf)
        assert all(key in self._pins for key in self._overdue)

    def _there(self, keys: list[ChunkKey]) -> list[ChunkKey]:
        return [key for key in dict.fromkeys(keys) if self._index.rows(key)]

    def _forget(self, key: ChunkKey) -> bool:
        """Remove the chunk's replicas. False: one of them is in use, and stays."""
        used = False
        for row in self._index.rows(key):
            if row in self._index.table.pins:
                used = True
            else:
                self._index.remove(row)
                self._counts["forgotten"] += 1
        return not used
