"""Pins what lies on the node's disk and is pinned in memory, each time that the metadata server takes the node in.

Orders that come while the node runs are carried out by `kvnode.upkeep`; this is for those from before its start.
"""

import asyncio
import logging
from typing import Protocol

from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from kvnode.tiers.limits import MoveLimits
from kvstore.tiers.base import LocalTier
from metadata_server.cache_messages import CACHE_CONTROL, PinsReply

_logger = logging.getLogger("kvnode")


class PinsClient(Protocol):
    """The call of `metadata_server.client` that is needed here."""

    @property
    def protocol(self) -> int:
        """The version in use."""
        ...

    async def pins(self) -> PinsReply:
        """What is pinned."""
        ...


class DiskPinner:
    """`tier`: the node's own disk."""

    def __init__(self, metadata: PinsClient, tier: LocalTier, limits: MoveLimits) -> None:
        self._metadata, self._tier, self._limits = metadata, tier, limits
        self._registered = asyncio.Event()

    def __repr__(self) -> str:
        return f"<DiskPinner of {self._tier.name}{', to ask' if self._registered.is_set() else ''}>"

    def registered(self) -> None:
        """The metadata server has taken the node in."""
        self._registered.set()

    async def run(self) -> None:
        """Until cancelled. A server that is away is asked again later; one that knows no pins has none."""
        while True:
            await self._registered.wait()
            self._registered.clear()
            if self._metadata.protocol < CACHE_CONTROL:
                continue
            try:
                self._pin(await self._metadata.pins())
            except (MetadataUnavailableError, MetadataProtocolError) as error:
                log_fields(_logger, logging.DEBUG, "pins_not_known", tier=self._tier.name, reason=error.message)
                self._registered.set()
                await asyncio.sleep(self._limits.retry_s)

    def _pin(self, reply: PinsReply) -> None:
        if not reply.pins:
            return
        there = {name.key: name for name in self._tier.names()}
        for pin in reply.pins:
            if pin.key in there:
                self._tier.pin([there[pin.key]], pin.left_s)
