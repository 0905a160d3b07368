"""After a start, brings the most used chunks of this node's disk into its segment, at leisure.

Owns nothing. Requests come first: it pauses after each batch, and ends when its share of the segment is full.
"""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass

from kvcore.eviction.quotas import TenantShares
from kvcore.extents import aligned
from kvcore.telemetry import log_fields
from kvcore.types import OwnerTag
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.promoter import TierPromoter
from kvnode.tiers.shape import ChunkShape
from kvstore.tiers.base import ChunkName, LocalTier
from kvstore.tiers.guarded import GuardedTier

_logger = logging.getLogger("kvnode")


@dataclass(frozen=True, slots=True)
class WarmRoom:
    """How much of the segment a warm-up may fill, and with chunks of each tenant: what is beyond its share would only
    push out what was brought before, and is used more."""

    segment_bytes: int
    share: float
    tenants: TenantShares

    @property
    def most_bytes(self) -> int:
        """Of all tenants together."""
        return int(self.segment_bytes * self.share)

    def most_of(self, owner: OwnerTag) -> int:
        """Bytes of one tenant's."""
        share = self.tenants.of(owner)
        return self.most_bytes if share is None else min(self.most_bytes, int(self.segment_bytes * share))


class TierWarmer:
    """Brings what lies in `disk`, most used first, by way of `tier`, which guards it."""

    def __init__(
        self,
        promoter: TierPromoter,
        tier: GuardedTier,
        disk: LocalTier,
        room: WarmRoom,
        limits: MoveLimits = MoveLimits(),
    ) -> None:
        self.promoted_chunks = 0
        self._promoter, self._tier, self._disk = promoter, tier, disk
        self._room, self._limits = room, limits
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
        wanted = self._wanted(shape)
        size = self._limits.batch_chunks
        for start in range(0, len(wanted), size):
            by_owner: dict[OwnerTag | None, list[ChunkName]] = {}
            for name, owner in wanted[start : start + size]:
                by_owner.setdefault(owner, []).append(name)
            for owner, names in by_owner.items():
                self.promoted_chunks += await self._promoter.promote_names(self._tier, names, shape, owner)
            await asyncio.sleep(self._limits.warm_pause_s)
        if wanted:
            log_fields(
                _logger, logging.INFO, "warmed_up", tier=self._tier.name, chunks=self.promoted_chunks, of=len(wanted)
            )

    def _wanted(self, shape: ChunkShape) -> list[tuple[ChunkName, OwnerTag | None]]:
        """What there is room for, each with whose it is."""
        size = aligned(shape.num_bytes)
        most = self._room.most_bytes // size
        names = [name for name in self._disk.names() if name.fingerprint in shape.fingerprints]
        of_one, wanted = Counter[OwnerTag](), list[tuple[ChunkName, OwnerTag | None]]()
        for name, owner in zip(names, self._disk.owners(names), strict=True):
            if len(wanted) == most:
                break
            if owner is not None:
                if of_one[owner] >= self._room.most_of(owner) // size:
                    continue
                of_one[owner] += 1
            wanted.append((name, owner))
        return wanted
