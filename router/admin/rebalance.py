"""How full the nodes' segments are, and the order to even them out: the metadata server's, passed on.

And what all orders need: a metadata server that knows them.
"""

from kvcore.errors import InvalidRequestError
from metadata_server.cache_messages import REBALANCE, RebalanceReply, RebalanceRequest
from metadata_server.client import MetadataClient


async def check_speaks(metadata: MetadataClient, version: int) -> None:
    """Raises InvalidRequestError if the metadata server is older than this version of the protocol, and
    MetadataUnavailableError."""
    if metadata.protocol < version:
        await metadata.nodes()  # it is not known yet, or the server was replaced by a newer one
    if metadata.protocol < version:
        raise InvalidRequestError("the metadata server is older than such orders: upgrade it")


class SegmentRebalance:
    """Both raise as `check_speaks`."""

    def __init__(self, metadata: MetadataClient) -> None:
        self._metadata = metadata

    async def order(self, request: RebalanceRequest) -> RebalanceReply:
        """Begin, or stop."""
        await check_speaks(self._metadata, REBALANCE)
        return await self._metadata.rebalance(request)

    async def look(self) -> RebalanceReply:
        """How it goes."""
        await check_speaks(self._metadata, REBALANCE)
        return await self._metadata.rebalancing()
