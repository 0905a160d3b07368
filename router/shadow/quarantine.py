"""Chunks that are wrong are dropped wherever they lie: in segments as one that a reader refused, and in tiers.

Owns nothing. What other engines have of them in blocks of their own is found by comparing there, too.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.types import ChunkKey
from metadata_server.client import MetadataClient
from metadata_server.messages import MatchRequest, QuarantineItem, QuarantineReason, QuarantineRequest
from router.upkeep.nodes import KeepingNodes


class Dropped(NamedTuple):
    """`nodes`: in whose segments copies were; `left`: what may still be somewhere, a sentence each."""

    nodes: list[str]
    left: list[str]


class DropChunks(Protocol):
    """`ChunkQuarantine.drop`, or what tests have in its place."""

    async def __call__(self, fingerprint: bytes, keys: Sequence[ChunkKey]) -> Dropped:
        """Drop these everywhere. Raises nothing for who does not answer: it is said."""
        ...


class ChunkQuarantine:
    """Of one cluster."""

    def __init__(self, metadata: MetadataClient, nodes: KeepingNodes) -> None:
        self._metadata, self._nodes = metadata, nodes

    async def drop(self, fingerprint: bytes, keys: Sequence[ChunkKey]) -> Dropped:
        """See DropChunks. Segments first: what lies there may still be on its way to a tier."""
        nodes, left = dict[str, None](), list[str]()
        try:
            for reply in await asyncio.gather(*(self._metadata.match(MatchRequest(keys=[key])) for key in keys)):
                owners = {segment.id: segment.node_id for segment in reply.segments}
                copies = [copy for of_key in reply.replicas for copy in of_key]
                items = [QuarantineItem(replica=copy, reason=QuarantineReason.CHECKSUM) for copy in copies]
                if items:
                    await self._metadata.quarantine(QuarantineRequest(items=items))
                nodes |= dict.fromkeys(owners.get(copy.segment_id, copy.segment_id) for copy in copies)
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            left.append(f"segments: {error.message}")
        _, problems = await self._nodes.order("remove", fingerprint, keys)
        return Dropped(list(nodes), left + problems)
