"""Replays the last hour's prompts now and then, and on demand, beside the event loop; says why the hit rate is low.

Owns the last replay's figures and what was warned of. The trace is the watch's, the figures are pure functions of it.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.telemetry import log_fields
from router.cache.advice import CacheAdvice, CacheRoom, advise, chunk_lengths, room_points
from router.cache.diagnosis import MissReason, diagnose, told
from router.cache.ghosts import hit_curve
from router.cache.limits import WatchLimits
from router.cache.report import CacheStats, RoomPoint
from router.cache.trace import TraceView
from router.cache.watch import CacheWatch
from router.nodes.cluster import Cluster

_log = logging.getLogger("router")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What the last hour would have hit with more room, and with shorter chunks."""

    rooms: Sequence[RoomPoint] = ()
    half_chunk_hit_rate: float | None = None


def replay(view: TraceView, room: CacheRoom, max_samples: int) -> Replayed:
    """Pure; up to a second of one core."""
    if room.chunk_tokens not in chunk_lengths(room, room.chunk_tokens):
        return Replayed()
    points = room_points(hit_curve(view.uses(room.chunk_tokens, max_samples)), room)
    half, half_rate = room.chunk_tokens // 2, None
    if 2 * half == room.chunk_tokens and half in chunk_lengths(room, half) and half != room.chunk_tokens:
        (point,) = room_points(hit_curve(view.uses(half, max_samples)), room, (1,))
        half_rate = point.hit_rate
    return Replayed(points, half_rate)


class CacheReplay:
    """One a router."""

    def __init__(
        self,
        watch: CacheWatch,
        cluster: Cluster,
        config: ClusterConfig,
        clock: Clock,
        *,
        limits: WatchLimits = WatchLimits(),
    ) -> None:
        self._watch, self._cluster, self._config, self._clock = watch, cluster, config, clock
        self._limits = limits
        self._last: Replayed | None = None
        self._requests_then = 0
        self._warned: tuple[MissReason, float] | None = None
        self._one_at_a_time = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<CacheReplay of {self._watch!r}>"

    def stats(self) -> CacheStats:
        """As of now; what would have been hit is as of the last replay."""
        stats, room = self._watch.counts(), self._room()
        stats.warn_below = self._config.router.cache.warn_below
        if room is None:
            return stats
        stats.chunk_tokens, stats.room_bytes = room.chunk_tokens, room.num_bytes
        if self._last is not None:
            stats.rooms, stats.half_chunk_hit_rate = list(self._last.rooms), self._last.half_chunk_hit_rate
            if (why := diagnose(stats, self._limits)) is not None:
                stats.reason, stats.problem = why.reason, told(stats, why)
        return stats

    async def run(self) -> None:
        """Look at prompts that wait, and replay again and again, as long as requests come."""
        replayed = self._clock.now()
        while True:
            await asyncio.sleep(self._limits.catch_up_s)
            self._watch.catch_up()
            if self._clock.now() - replayed >= self._limits.replay_s:
                await self.refresh()
                replayed = self._clock.now()

    async def refresh(self) -> None:
        """Replay the last hour, and warn if the hit rate is low: once an hour, and at once when the reason is another.
        Nothing if no request has ended since."""
        room, requests = self._room(), self._watch.start.requests
        if room is None or requests == self._requests_then:
            return
        self._requests_then = requests
        view = self._watch.trace.view(self._clock.now())
        async with self._one_at_a_time:
            self._last = await asyncio.to_thread(replay, view, room, self._limits.max_samples)
        stats, now = self.stats(), self._clock.now()
        if stats.reason is None:
            return
        reason = MissReason(stats.reason)
        if self._warned is None or self._warned[0] is not reason or now - self._warned[1] >= self._limits.warn_s:
            self._warned = reason, now
            log_fields(_log, logging.WARNING, "low_hit_rate", reason=reason, problem=stats.problem)

    async def advise(self) -> CacheAdvice:
        """What would have served the last hour best."""
        room = self._room()
        if room is None:
            return CacheAdvice(advice=["no node with a segment has said what its KV is yet"])
        view = self._watch.trace.view(self._clock.now())
        longest = max(room.chunk_tokens, min(4096, self._cluster.max_context() or 4096))
        async with self._one_at_a_time:
            return await asyncio.to_thread(advise, view, room, longest=longest, max_samples=self._limits.max_samples)

    def _room(self) -> CacheRoom | None:
        """What the nodes say of their segments and tiers. None: no engine, or no segment."""
        reports = [node.report for node in self._cluster.nodes.values() if node.report is not None]
        engine = next((report.engine for report in reports if report.engine is not None), None)
        segments = sum(segment.size_bytes for report in reports for segment in report.segments)
        if engine is None or not segments:
            return None
        tiers: dict[str, int] = {}
        for tier in (tier for report in reports for tier in report.tiers):
            size = tier.capacity_bytes or 0
            tiers[tier.name] = max(tiers.get(tier.name, 0), size) if tier.shared else tiers.get(tier.name, 0) + size
        filled = (self._config.store.low_watermark + self._config.store.high_watermark) / 2
        return CacheRoom(
            chunk_tokens=engine.kv_spec.chunk_tokens,
            chunk_bytes=engine.kv_spec.chunk_bytes,
            block_tokens=engine.block_size,
            memory_bytes=int(segments * filled),
            tier_bytes=max(tiers.values(), default=0),
        )
