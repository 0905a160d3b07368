"""The other nodes' disks, found through the metadata server and asked over their control APIs."""

import logging
from collections.abc import Sequence
from typing import Protocol

import msgspec

from kvcore.errors import KVFerryError, MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from kvcore.types import ChunkKey, NodeInfo, OwnerTag
from kvstore.tiers.base import ChunkName
from metadata_server.client import MetadataClient
from metadata_server.messages import TIER_HOLDINGS, FindHoldersRequest
from nodeapi.messages import PROMOTE_OWNER, PromoteReply, PromoteRequest

_logger = logging.getLogger("kvnode")


class PromoteClient(Protocol):
    """Calls to nodes by their control URL: `nodeapi.client` makes them over HTTP, the simulation without."""

    async def promote(self, url: str, request: PromoteRequest, *, timeout_s: float) -> PromoteReply:
        """Have a node bring chunks from its tiers into its segment. Raises errors of kvcore.errors only."""
        ...


class PeerDisks:
    """See `kvnode.tiers.promoter.Peers`. Never raises but for cancellation: a peer that cannot help is a miss."""

    def __init__(self, metadata: MetadataClient, client: PromoteClient, node_id: str) -> None:
        """Both clients stay the caller's."""
        self._metadata, self._client, self._node_id = metadata, client, node_id
        self._known: dict[str, NodeInfo] = {}

    async def holders(self, keys: Sequence[ChunkKey], *, timeout_s: float) -> list[list[str]]:
        """See `Peers`."""
        if self._metadata.protocol < TIER_HOLDINGS or not keys:
            return []
        try:
            reply = await self._metadata.find_holders(FindHoldersRequest(keys=list(keys)), timeout_s=timeout_s)
        except (MetadataUnavailableError, MetadataProtocolError):
            return []
        self._known = {node.id: node for node in reply.nodes}
        names = [node.id for node in reply.nodes]
        return [[names[n] for n in having if n < len(names) and names[n] != self._node_id] for having in reply.holders]

    async def promote(
        self, node_id: str, names: Sequence[ChunkName], *, owner: OwnerTag | None = None, timeout_s: float
    ) -> PromoteReply:
        """See `Peers`."""
        node = self._known.get(node_id)
        if node is None or timeout_s <= 0 or not names:
            return PromoteReply()
        request = PromoteRequest(
            fingerprint=names[0].fingerprint,
            keys=[name.key for name in names],
            deadline_s=timeout_s,
            owner=owner if owner is not None and node.protocol >= PROMOTE_OWNER else msgspec.UNSET,
        )
        try:
            reply = await self._client.promote(node.control_url, request, timeout_s=timeout_s)
        except KVFerryError as error:
            log_fields(_logger, logging.INFO, "peer_promotion_failed", peer=node_id, reason=error.message)
            return PromoteReply()
        return PromoteReply(
            promoted=[msgspec.structs.replace(one, node=node_id) for one in reply.promoted],
            choices=[msgspec.structs.replace(one, node=node_id) for one in reply.choices],
        )
