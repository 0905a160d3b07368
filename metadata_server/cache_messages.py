"""Wire messages with which people and hints say what the cache shall keep (docs/wire-formats.md).

As all messages of the metadata server, see `metadata_server.messages`. Since version CACHE_CONTROL of the protocol.
"""

from kvcore.types import ChunkKey
from metadata_server.messages import ReplyBody, RequestBody

CACHE_CONTROL = 3
"""Since which chunks are pinned, evicted and given a time by their keys."""


class PinRequest(RequestBody, frozen=True, kw_only=True):
    """Keep every replica of these chunks from eviction, those that are there and those to come."""

    keys: list[ChunkKey]
    ttl_s: float | None = None
    """For so long from now. None: until they are unpinned. A chunk that is pinned already gets this time."""
    extend: bool = False
    """A chunk that is pinned for longer already stays so: for those who must not undo others' pins."""


class UnpinRequest(RequestBody, frozen=True, kw_only=True):
    """End the pins of these chunks."""

    keys: list[ChunkKey]


class EvictRequest(RequestBody, frozen=True, kw_only=True):
    """Forget all complete replicas of these chunks now."""

    keys: list[ChunkKey]


class ExpireRequest(RequestBody, frozen=True, kw_only=True):
    """Forget the chunks that are there now when `ttl_s` is over; for a pinned one, when its pin has ended."""

    keys: list[ChunkKey]
    ttl_s: float


class CacheReply(ReplyBody, frozen=True, kw_only=True):
    """How many of the request's keys were ..."""

    known: int
    """... of a chunk that lies in memory (`unpin`: of a pinned one);"""
    done: int
    """... pinned, unpinned, evicted or given their time;"""
    refused: int
    """... not: `pin`: pins have their share of the memory already; `evict`: the chunk is pinned, or being read."""


class Pin(ReplyBody, frozen=True, kw_only=True):
    """One pinned chunk."""

    key: ChunkKey
    left_s: float | None = None
    """None: until it is unpinned."""
    replicas: int = 0
    """Kept from eviction by it; 0: none is there, or pins had no room for it."""


class PinsReply(ReplyBody, frozen=True, kw_only=True):
    """What is pinned: the oldest pins, as many as one answer holds, and how many there are in all."""

    num_pins: int
    pinned_bytes: int
    most_bytes: int
    """That pins may take of the cluster's memory (`store.pin_share`)."""
    pins: list[Pin]
