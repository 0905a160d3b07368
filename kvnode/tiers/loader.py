"""Loads chunks from tiers into room of this node's segment, checks them, and makes them visible.

Owns no chunk and no policy. Invariants: only verified chunks become visible; nothing stays reserved; no byte is written
after the time for it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvcore.clock import Clock
from kvcore.telemetry import log_fields
from kvcore.types import ChunkKey, OwnerTag
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.own_segment import OwnSegment, ReservedRoom
from kvstore.tiers.base import ChunkName, TierChunk, TierOutcome
from kvstore.tiers.guarded import GuardedTier
from kvstore.types import GetOutcome, RunBlocking
from nodeapi.messages import Promoted

_logger = logging.getLogger("kvnode")


@dataclass(slots=True)
class LoadPlan:
    """Which tiers have each of some chunks."""

    names: list[ChunkName] = field(default_factory=list)
    tiers: list[list[GuardedTier]] = field(default_factory=list)
    one_prompt: bool = True
    """Each chunk is of use only behind the one before it, and all have the size that is asked for. Else each is of use
    by itself, and some may be of another size."""
    owner: OwnerTag | None = None
    """Whose they are, if that is known."""

    def part(self, start: int, stop: int) -> "LoadPlan":
        """Some of it."""
        return LoadPlan(self.names[start:stop], self.tiers[start:stop], self.one_prompt, self.owner)


@dataclass(slots=True)
class Loaded:
    """What came of a plan. `num_there`: so many of its leading chunks are complete now, whoever brought them."""

    promoted: list[Promoted] = field(default_factory=list)
    num_there: int = 0


class TierLoader:
    """`timeouts`: of each tier by name, for one call. `run_blocking` runs checksums. `on_promoted` is told of chunks
    that came from a tier, before they are committed; `on_lost` of those that it turned out not to have."""

    def __init__(
        self,
        segment: OwnSegment,
        timeouts: dict[str, float],
        clock: Clock,
        *,
        run_blocking: RunBlocking,
        limits: MoveLimits,
    ) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """(tier, what) -> chunks since start: `promoted`, `missing` (found, then not there), `no_room`, and of those
        that were refused and removed there `forged`, `unproven` and `damaged`."""
        self.on_promoted: Callable[[GuardedTier, Sequence[ChunkKey]], None] = lambda _tier, _keys: None
        self.on_lost: Callable[[GuardedTier, Sequence[ChunkKey]], None] = lambda _tier, _keys: None
        self._segment, self._timeouts, self._clock, self._limits = segment, timeouts, clock, limits
        self._run_blocking = run_blocking

    async def load(self, plan: LoadPlan, num_bytes: int, end: float) -> Loaded:
        """Batch after batch until `end`, and of one prompt up to the first hole: what is behind it is computed anyway.
        `num_bytes`: of each chunk, header included."""
        done = Loaded()
        size = max(1, min(self._limits.batch_chunks, self._limits.batch_bytes // num_bytes))
        for start in range(0, len(plan.names), size):
            left_s = end - self._clock.now()
            if left_s <= 0:
                break
            part = plan.part(start, start + size)
            room = await self._segment.reserve(part.names, num_bytes, owner=plan.owner, timeout_s=left_s)
            try:
                got = await self._load_batch(part, room, end)
            finally:
                await self._segment.give_back(room)
            done.promoted += got.promoted
            done.num_there += got.num_there
            if plan.one_prompt and got.num_there < len(part.names):
                break
        return done

    async def _load_batch(self, plan: LoadPlan, room: ReservedRoom, end: float) -> Loaded:
        """From each chunk's fastest tier, then what failed from its next one."""
        there = set(room.reserved.complete)
        missing = [name for name in plan.names if name.key not in room.chunks and name.key not in there]
        if missing:
            self.counts[plan.tiers[0][0].name, "no_room"] += len(missing)
        came: dict[ChunkKey, GuardedTier] = {}
        began = self._clock.now()
        for nth in range(max(map(len, plan.tiers))):
            by_tier: dict[str, tuple[GuardedTier, list[TierChunk]]] = {}
            for name, having in zip(plan.names, plan.tiers, strict=True):
                if name.key in room.chunks and name.key not in came and nth < len(having):
                    by_tier.setdefault(having[nth].name, (having[nth], []))[1].append(room.chunks[name.key])
            calls = (self._load_from(tier, chunks, plan, room, end) for tier, chunks in by_tier.values())
            for (tier, _), keys in zip(by_tier.values(), await asyncio.gather(*calls), strict=True):
                came.update((key, tier) for key in keys)
        leading = _num_leading(plan.names, there | came.keys()) if plan.one_prompt else len(plan.names)
        wanted = [name.key for name in plan.names[:leading] if name.key in came]
        for tier in set(came.values()):
            self.on_promoted(tier, [key for key in wanted if came[key] is tier])
        visible = await self._segment.commit(room, wanted, timeout_s=max(0.1, end - self._clock.now()))
        promoted = self._count(visible, came, room, self._clock.now() - began)
        return Loaded(promoted, _num_leading(plan.names, there | visible))

    def _count(
        self, visible: set[ChunkKey], came: dict[ChunkKey, GuardedTier], room: ReservedRoom, seconds: float
    ) -> list[Promoted]:
        by_tier: dict[str, int] = {}
        for key in visible:
            by_tier[came[key].name] = by_tier.get(came[key].name, 0) + room.chunks[key].num_bytes
        result = []
        for tier, num_bytes in sorted(by_tier.items()):
            number = sum(came[key].name == tier for key in visible)
            self.counts[tier, "promoted"] += number
            result.append(Promoted(tier=tier, num_chunks=number, num_bytes=num_bytes, seconds=seconds))
        return result

    async def _load_from(
        self, tier: GuardedTier, chunks: list[TierChunk], plan: LoadPlan, room: ReservedRoom, end: float
    ) -> list[ChunkKey]:
        """Which of them are in their room, whole."""
        timeout_s = min(end, room.write_by) - self._clock.now()
        if timeout_s <= 0:
            return []
        outcomes = await tier.load(chunks, timeout_s=min(timeout_s, self._timeouts[tier.name]))
        came, damaged, missing = list[ChunkKey](), list[ChunkName](), list[ChunkKey]()
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            why: str = outcome
            if outcome is TierOutcome.OK:
                why = await self._run_blocking(partial(self._segment.check, room, chunk.name.key))
                if why == GetOutcome.OK:
                    came.append(chunk.name.key)
                    continue
            elif outcome is TierOutcome.MISSING:
                missing.append(chunk.name.key)
                self.counts[tier.name, "missing"] += 1
                continue
            elif outcome is not TierOutcome.DAMAGED and not (outcome is TierOutcome.TOO_LARGE and plan.one_prompt):
                continue
            damaged.append(chunk.name)
            self.counts[tier.name, why if why in (GetOutcome.FORGED, GetOutcome.UNPROVEN) else "damaged"] += 1
            log_fields(_logger, logging.WARNING, "tier_damaged", tier=tier.name, chunk=chunk.name.text, why=why)
        if damaged or missing:
            self.on_lost(tier, [*missing, *(name.key for name in damaged)])
            await tier.remove(damaged, timeout_s=self._timeouts[tier.name])
        return came


def _num_leading(names: Sequence[ChunkName], there: set[ChunkKey]) -> int:
    return next((number for number, name in enumerate(names) if name.key not in there), len(names))
