"""What the gate of documents has turned is kept by the metadata server, so that no start of a router turns it on again.

Owns when that server is told and asked. Invariant: until it was heard once, this router reuses no documents, as they
may have been turned off before it began.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from metadata_server.cache_messages import BLEND_SWITCHES, BlendSwitchesRequest, KindSwitch
from metadata_server.client import MetadataClient
from router.shadow.gate import BlendGate
from router.shadow.limits import ShadowLimits

UNHEARD = "the metadata server, which knows whether they were turned off, was not heard yet"
_log = logging.getLogger("router")


class KeptSwitches:
    """Of one router. `told`: takes what is kept (`router.shadow.wiring.follow`)."""

    def __init__(
        self,
        gate: BlendGate,
        metadata: MetadataClient,
        told: Callable[[Sequence[KindSwitch]], None],
        limits: ShadowLimits = ShadowLimits(),
    ) -> None:
        self._gate, self._metadata, self._told, self._limits = gate, metadata, told, limits
        self._changed = asyncio.Event()
        gate.unheard = UNHEARD
        gate.on_change.append(self._changed.set)

    def __repr__(self) -> str:
        return f"<KeptSwitches of {self._gate!r}{', unheard' if self._gate.unheard else ''}>"

    async def run(self) -> None:
        """Tell what was turned here, at once, and hear what was turned elsewhere, until cancelled."""
        while True:
            self._changed.clear()
            await self.exchange()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._limits.keep_again_s):
                    await self._changed.wait()

    async def exchange(self) -> None:
        """Once. A server that is away is told the next time; one that is older keeps nothing."""
        try:
            if self._metadata.protocol < BLEND_SWITCHES:
                await self._metadata.nodes()  # it is not known yet, or the server was replaced by a newer one
            if self._metadata.protocol >= BLEND_SWITCHES:
                request = BlendSwitchesRequest(switches=self._gate.switches())
                self._told((await self._metadata.blend_switches(request)).switches)
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            log_fields(_log, logging.DEBUG, "switches_not_kept", error=error.message)
            return
        self._gate.unheard = ""
