"""Orders about chunks in the nodes' segments: carried out by the metadata server, which owns what lies there."""

from collections.abc import Sequence
from typing import Literal

from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.types import ChunkKey
from metadata_server.cache_messages import CACHE_CONTROL, CacheReply
from metadata_server.client import MetadataClient
from router.upkeep.limits import UpkeepLimits
from router.upkeep.reports import PlaceCount

OrderKind = Literal["pin", "unpin", "expire", "evict"]
MEMORY = "memory"


class SegmentOrders:
    """`carry_out` never raises for a server that is away: it says so."""

    def __init__(self, metadata: MetadataClient, limits: UpkeepLimits) -> None:
        self._metadata, self._limits = metadata, limits

    async def carry_out(self, kind: OrderKind, keys: Sequence[ChunkKey], ttl_s: float | None = None) -> PlaceCount:
        """Of `keys`; `ttl_s` of `expire` and `pin`. `problem`: why not of all."""
        done = refused = 0
        try:
            if self._metadata.protocol < CACHE_CONTROL:
                await self._metadata.nodes()  # it is not known yet, or the server was replaced by a newer one
            if self._metadata.protocol < CACHE_CONTROL:
                return PlaceCount(place=MEMORY, chunks=0, problem="the metadata server is older than such orders")
            for start in range(0, len(keys), self._limits.keys_a_call):
                reply = await self._call(kind, keys[start : start + self._limits.keys_a_call], ttl_s)
                done, refused = done + reply.done, refused + reply.refused
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            return PlaceCount(place=MEMORY, chunks=done, problem=error.message)
        return PlaceCount(place=MEMORY, chunks=done, problem=_why(kind, refused) if refused else "")

    async def _call(self, kind: OrderKind, keys: Sequence[ChunkKey], ttl_s: float | None) -> CacheReply:
        match kind:
            case "pin":
                return await self._metadata.pin(keys, ttl_s)
            case "unpin":
                return await self._metadata.unpin(keys)
            case "evict":
                return await self._metadata.evict(keys)
            case "expire":
                longest_s = self._limits.longest_s
                return await self._metadata.expire(keys, longest_s if ttl_s is None else min(ttl_s, longest_s))


def _why(kind: OrderKind, refused: int) -> str:
    if kind == "pin":
        return f"{refused} chunks were not pinned: pins have their share of the memory already (store.pin_share)"
    return f"{refused} chunks are pinned, or being read"
