"""Tells the metadata server what lies in the node's segments, in pieces, after it has forgotten it.

Owns the pauses between tries. The lease is its caller's: it goes on meanwhile. Invariant: one piece is under way, and
the next one is sent when it is noted, so that what is told first is the oldest.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from kvcore.types import NodeInfo
from kvnode.limits import NodeLimits
from kvnode.partitions.slices import of_part
from metadata_server.account_messages import ImportReply, ImportRequest
from metadata_server.client import MetadataClient
from metadata_server.messages import TOLD_OWNERS, ManifestEntry, SegmentManifest

_logger = logging.getLogger("kvnode")


def without_owners(entries: list[ManifestEntry]) -> list[ManifestEntry]:
    """As a server of before TOLD_OWNERS takes them."""
    return [msgspec.structs.replace(entry, owner=msgspec.UNSET) for entry in entries]


class ManifestPieces:
    """`scan` lists the node's segments and what lies in them, newest first, off the loop."""

    def __init__(
        self,
        client: MetadataClient,
        node: NodeInfo,
        scan: Callable[[], Awaitable[list[SegmentManifest]]],
        *,
        draw: Callable[[], float],
        limits: NodeLimits,
    ) -> None:
        """The client stays the caller's; of `node` the id and the incarnation count."""
        self._client = client
        self._node = node
        self._scan = scan
        self._draw = draw
        self._limits = limits
        self.sent = 0
        """Pieces that were noted, since start."""

    def __repr__(self) -> str:
        return f"<ManifestPieces of {self._node.id}, {self.sent} sent>"

    async def tell(self, wanted: Mapping[str, int]) -> bool:
        """Tell what lies in those segments, under those numbers. False: the server knows us no longer, or does not
        understand us: register again."""
        await asyncio.sleep(self._limits.spread_s * self._draw())  # all nodes have heard of a restart at one time
        chunks = imported = 0
        for manifest in await self._scan():
            number = wanted.get(manifest.segment.id)
            if number is None:
                continue
            entries = of_part(manifest, self._client.part).entries[::-1]
            if self._client.protocol < TOLD_OWNERS:
                entries = without_owners(entries)
            for start in range(0, len(entries) or 1, self._limits.piece_entries):
                piece = ImportRequest(
                    node_id=self._node.id,
                    incarnation=self._node.incarnation,
                    segment_id=manifest.segment.id,
                    number=number,
                    entries=entries[start : start + self._limits.piece_entries],
                    last=start + self._limits.piece_entries >= len(entries),
                )
                reply = await self._send(piece)
                if not reply.known:
                    return False
                self.sent += 1
                imported += reply.imported
            chunks += len(entries)
        log_fields(_logger, logging.INFO, "manifest_told", node=self._node.id, chunks=chunks, imported=imported)
        return True

    async def _send(self, piece: ImportRequest) -> ImportReply:
        """Until it is noted, or the server does not know us."""
        pause_s = self._limits.lease_first_backoff_s
        while True:
            try:
                reply = await self._client.import_piece(piece)
            except MetadataUnavailableError:
                await asyncio.sleep(pause_s * (0.5 + self._draw()))
                pause_s = min(2 * pause_s, self._limits.longest_piece_pause_s)
                continue
            except MetadataProtocolError as error:
                log_fields(_logger, logging.ERROR, "manifest_refused", node=self._node.id, reason=error.message)
                await asyncio.sleep(self._limits.longest_piece_pause_s)
                return ImportReply(known=False)
            if reply.again_s == 0.0:
                return reply
            await asyncio.sleep(reply.again_s * (0.5 + self._draw()))
