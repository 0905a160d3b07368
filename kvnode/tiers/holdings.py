"""Tells the metadata server what lies on this node's disk, so that other nodes know whom to ask.

Owns what is not told yet. What is told is soft state: after each registration all of it is told again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence

from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from kvcore.types import ChunkKey, NodeInfo
from kvnode.tiers.limits import MoveLimits
from kvstore.tiers.base import ChunkName
from metadata_server.client import MetadataClient
from metadata_server.messages import TIER_HOLDINGS, TellHoldingsRequest

_logger = logging.getLogger("kvnode")


class HoldingsAnnouncer:
    """`run` it in a task. `names` says all that lies on the disk; `changed` is told what came and left since."""

    def __init__(
        self,
        metadata: MetadataClient,
        node: NodeInfo,
        names: Callable[[], list[ChunkName]],
        limits: MoveLimits = MoveLimits(),
    ) -> None:
        self._metadata, self._node, self._names, self._limits = metadata, node, names, limits
        self._changes: dict[ChunkKey, bool] = {}
        """Key -> whether it came (else it left), since the last telling."""
        self._all = True
        self._news = asyncio.Event()
        self._hurry = asyncio.Event()
        self.told = False
        """Whether the metadata server was told all that lies here, since it last took the node in."""

    def __repr__(self) -> str:
        return f"<HoldingsAnnouncer {'all' if self._all else len(self._changes)} to be told>"

    def changed(self, came: Sequence[ChunkName], left: Sequence[ChunkName]) -> None:
        """What came to the disk and what left it."""
        for name in came:
            self._changes[name.key] = True
        for name in left:
            self._changes[name.key] = False
        self._news.set()

    def tell_all(self) -> None:
        """The metadata server knows nothing of this node's disk: it has started again, or the node has registered."""
        self._all, self.told = True, False
        self._news.set()
        self._hurry.set()

    @property
    def can_tell(self) -> bool:
        """Whether the metadata server is known to be new enough to be told."""
        return self._metadata.protocol >= TIER_HOLDINGS

    async def run(self) -> None:
        """Until cancelled: at once when the node has registered, and a moment after changes. A server that is away, or
        too old to be told, is tried again later."""
        while True:
            await self._news.wait()
            self._news.clear()
            self._hurry.clear()
            done = self.can_tell and await self._tell()
            if not done:
                self._all = True
                self._news.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.announce_s if done else self._limits.retry_s):
                    await self._hurry.wait()

    async def _tell(self) -> bool:
        everything, self._all = self._all, False
        changes, self._changes = self._changes, {}
        came: Iterable[ChunkKey] = (key for key, there in changes.items() if there)
        left = [key for key, there in changes.items() if not there]
        if everything:
            came, left = dict.fromkeys(name.key for name in self._names()), []
        try:
            done = await self._send(list(came), left, reset=everything)
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            log_fields(_logger, logging.DEBUG, "holdings_not_told", node=self._node.id, reason=error.message)
            return False
        self.told = self.told or (done and everything and not self._all)
        return done

    async def _send(self, came: list[ChunkKey], left: list[ChunkKey], *, reset: bool) -> bool:
        size = self._limits.announce_keys
        for start in range(0, max(len(came), len(left), 1), size):
            reply = await self._metadata.tell_holdings(
                TellHoldingsRequest(
                    node_id=self._node.id,
                    incarnation=self._node.incarnation,
                    added=came[start : start + size],
                    removed=left[start : start + size],
                    reset=reset and start == 0,
                )
            )
            if not reply.known:
                return False
        return True
