"""After a start, brings the most used chunks of this node's disk into its segment, at leisure.

Owns nothing. Requests come first: it pauses after each batch, and ends when its share of the segment is full.
"""

import asyncio
import logging
from collections.abc import Callable

from kvcore.extents import aligned
from kvcore.telemetry import log_fields
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.promoter import TierPromoter
from kvnode.tiers.shape import ChunkShape
from kvstore.tiers.base import ChunkName
from kvstore.tiers.guarded import GuardedTier

_logger = logging.getLogger("kvnode")


class TierWarmer:
    """`names`: what lies on the disk, most used first. `share_bytes`: of the segment, at most."""

    def __init__(
        self,
        promoter: TierPromoter,
        tier: GuardedTier,
        names: Callable[[], list[ChunkName]],
        share_bytes: float,
        limits: MoveLimits = MoveLimits(),
    ) -> None:
        self.promoted_chunks = 0
        self._promoter, self._tier, self._names = promoter, tier, names
        self._share_bytes, self._limits = share_bytes, limits
        self._shape: ChunkShape | None = None
        self._ready = asyncio.Event()

    def __repr__(self) -> str:
        return f"<TierWarmer from {self._tier.name}, {self.promoted_chunks} chunks promoted>"

    def start(self, shape: ChunkShape) -> None:
        """The node's engine reads KV of this shape. Only the first call counts: later starts of the engine find the
        segment as it was."""
        if self._shape is None:
            self._shape = shape
            self._ready.set()

    async def run(self) -> None:
        """Once; cancelling it stops the warm-up."""
        await self._ready.wait()
        shape = self._shape
        assert shape is not None
        most = int(self._share_bytes / aligned(shape.num_bytes))
        wanted = [name for name in self._names() if name.fingerprint in shape.fingerprints][:most]
        size = self._limits.batch_chunks
        for start in range(0, len(wanted), size):
            got = await self._promoter.promote_names(self._tier, wanted[start : start + size], shape)
            self.promoted_chunks += got
            await asyncio.sleep(self._limits.warm_pause_s)
        if wanted:
            log_fields(
                _logger, logging.INFO, "warmed_up", tier=self._tier.name, chunks=self.promoted_chunks, of=len(wanted)
            )
