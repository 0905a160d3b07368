"""Copies what is committed in this node's segment to its tiers, behind the commit, so that eviction loses nothing.

Follows the metadata server's events. Owns a queue a tier, bounded: what does not fit in is not saved, and counted.
Invariant: a chunk is read under a lease, so a tier never gets bytes of which half are the next chunk's.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvcore.config.tiers import Admission
from kvcore.partitions import Part
from kvcore.telemetry import log_fields
from kvcore.types import ChunkKey
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.own_segment import OwnSegment
from kvstore.tiers.base import TierChunk, TierOutcome
from kvstore.tiers.guarded import GuardedTier
from metadata_server.messages import Event, EventKind

_logger = logging.getLogger("kvnode")


class RecentKeys:
    """A set of the keys that were added last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._keys: OrderedDict[ChunkKey, None] = OrderedDict()

    def add(self, key: ChunkKey) -> bool:
        """Whether it is new. It is the latest now."""
        new = key not in self._keys
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)
        return new

    def discard(self, key: ChunkKey) -> None:
        """Forget it, if it is known."""
        self._keys.pop(key, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._keys.clear()

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._keys


@dataclass(slots=True)
class _Lane:
    """One tier's queue and what is known of it."""

    tier: GuardedTier
    admission: Admission
    ttl_s: float | None
    timeout_s: float
    saved: RecentKeys
    """Chunks of this segment that the tier has, as far as we know. What left the segment is not among them: when it is
    committed here once more it was computed, as the tier had it no longer."""
    queue: OrderedDict[ChunkKey, None] = field(default_factory=OrderedDict)
    filled: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class FilledTier:
    """A tier, and what the cluster file says of filling it."""

    tier: GuardedTier
    admission: Admission = "always"
    ttl_s: float | None = None
    timeout_s: float = 2.0


class TierFiller:
    """An IndexSink. `run` it in a task; cancel the task to end it."""

    def __init__(self, segment: OwnSegment, tiers: Iterable[FilledTier], limits: MoveLimits = MoveLimits()) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        """(tier, what) -> chunks since start: `saved`, `there` (found in it already), `dropped` (queue full), `gone`
        (evicted before they were saved), `failed`."""
        self.full_bytes: dict[bytes, int] = {}
        """Fingerprint -> header and payload of a full chunk, of the KV that this node knows. Shorter ones are not
        saved: a prompt's rest is for the one decoder that waits for it."""
        self._segment = segment
        self._limits = limits
        self._lanes = [
            _Lane(one.tier, one.admission, one.ttl_s, one.timeout_s, RecentKeys(limits.max_remembered)) for one in tiers
        ]
        self._held: set[ChunkKey] = set()
        self._asked_once = RecentKeys(limits.max_remembered)

    def __repr__(self) -> str:
        queued = ", ".join(f"{len(lane.queue)} for {lane.tier.name}" for lane in self._lanes)
        return f"<TierFiller of {self._segment.segment_id}: {len(self._held)} chunks, queued {queued or 'nothing'}>"

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be saved."""
        return not any(lane.queue for lane in self._lanes)

    # --- what it is told ---

    def sink_of(self, part: Part | None) -> "TierFiller | _FillerOfPart":
        """For the events of one partition of the index, which say nothing of the others' chunks; None: of all."""
        return self if part is None else _FillerOfPart(self, part)

    def on_reset(self, part: Part | None = None) -> None:
        """See IndexSink. `part`: only what belongs to it."""
        gone = [key for key in self._held if part is None or part.owns(key)]
        for lane in self._lanes:
            for key in [*gone, *(key for key in lane.queue if part is None or part.owns(key))]:
                lane.queue.pop(key, None)
                lane.saved.discard(key)
            if part is None:
                lane.saved.clear()
        self._held.difference_update(gone)

    def on_events(self, events: list[Event], part: Part | None = None) -> None:
        """See IndexSink. Only what happens in this node's segment counts."""
        for event in events:
            if event.kind is EventKind.NODE_DOWN and event.node_id == self._segment.node_id:
                self.on_reset(part)  # it has lost its place, and all that is known of its segment with it
            if event.segment_id != self._segment.segment_id:
                continue
            if event.kind is EventKind.STORED:
                self._held.update(event.keys)
                for lane in self._lanes:
                    self._enqueue(lane, event.keys if lane.admission == "always" else ())
            elif event.kind is EventKind.REMOVED:
                self._held.difference_update(event.keys)
                for lane in self._lanes:
                    self._drop_gone(lane, event.keys)

    def on_asked(self, keys: Iterable[ChunkKey]) -> None:
        """A prompt with these chunks came. Those that came before are worth keeping (admission `second_use`)."""
        again = [key for key in keys if not self._asked_once.add(key)]
        for lane in self._lanes:
            if lane.admission == "second_use":
                self._enqueue(lane, (key for key in again if key in self._held))

    def on_promoted(self, tier: GuardedTier, keys: Iterable[ChunkKey]) -> None:
        """These came from `tier`: it has them."""
        for lane in self._lanes:
            if lane.tier is tier:
                for key in keys:
                    lane.saved.add(key)
                    lane.queue.pop(key, None)

    def on_lost(self, tier: GuardedTier, keys: Iterable[ChunkKey]) -> None:
        """`tier` does not have these any more, or not whole."""
        for lane in self._lanes:
            if lane.tier is tier:
                for key in keys:
                    lane.saved.discard(key)

    def forget(self, keys: Iterable[ChunkKey] | None) -> None:
        """Somebody has removed these from tiers, or (None) nobody knows what: whether a tier has one is to be asked."""
        for lane in self._lanes:
            if keys is None:
                lane.saved = RecentKeys(self._limits.max_remembered)
            for key in keys or ():
                lane.saved.discard(key)

    def _enqueue(self, lane: _Lane, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            if key in lane.saved or key in lane.queue:
                continue
            if len(lane.queue) >= self._limits.max_queued:
                self.counts[lane.tier.name, "dropped"] += 1
                continue
            lane.queue[key] = None
        if lane.queue:
            lane.filled.set()

    # --- what it does ---

    async def run(self) -> None:
        """Save what is queued, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._work(lane), name=f"fill-{lane.tier.name}")

    async def _work(self, lane: _Lane) -> None:
        while True:
            lane.filled.clear()
            if not lane.queue:
                await lane.filled.wait()
                continue  # what was queued may be gone again
            batch = [key for key, _ in zip(lane.queue, range(self._limits.batch_chunks), strict=False)]
            if lane.tier.away or not await self._save(lane, batch):
                await asyncio.sleep(self._limits.retry_s)

    async def _save(self, lane: _Lane, batch: list[ChunkKey]) -> bool:
        """One batch, or the first of it. Whether the tier and the metadata server answered."""
        leased = await self._segment.lease(batch, timeout_s=lane.timeout_s)
        try:
            chunks = self._fitting([chunk for chunk in leased.chunks if self._is_full(chunk)])
            if not leased.chunks and leased.match.num_chunks == 0:  # the first one is gone, or nobody can say
                return self._first_is_gone(lane, batch[0])
            there = await lane.tier.find([chunk.name for chunk in chunks], timeout_s=lane.timeout_s)
            missing = [chunk for chunk, found in zip(chunks, there, strict=True) if not found]
            with self._segment.renewing(leased):
                outcomes = await lane.tier.save(missing, ttl_s=lane.ttl_s, timeout_s=lane.timeout_s)
        finally:
            await self._segment.release(leased)
        self.counts[lane.tier.name, "there"] += len(chunks) - len(missing)
        taken = {chunk.name.key for chunk in chunks}
        unread = set(batch[: leased.looked_at]) - {chunk.name.key for chunk in leased.chunks if self._is_full(chunk)}
        for key in taken | unread:
            lane.queue.pop(key, None)
        for key in taken:
            lane.saved.add(key)
        return self._learn(lane, missing, outcomes)

    def _first_is_gone(self, lane: _Lane, key: ChunkKey) -> bool:
        if key in self._held:  # as far as we know it is there: the metadata server, or its partition, did not answer
            lane.queue.move_to_end(key)  # the others' turn: they may be another partition's
            return False
        self._drop_gone(lane, [key])
        return True

    def _drop_gone(self, lane: _Lane, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            lane.saved.discard(key)
            if key in lane.queue:
                del lane.queue[key]
                self.counts[lane.tier.name, "gone"] += 1

    def _is_full(self, chunk: TierChunk) -> bool:
        return chunk.num_bytes >= self.full_bytes.get(chunk.name.fingerprint, 0)

    def _fitting(self, chunks: list[TierChunk]) -> list[TierChunk]:
        total, fitting = 0, list[TierChunk]()
        for chunk in chunks:
            total += chunk.num_bytes
            if fitting and total > self._limits.batch_bytes:
                break
            fitting.append(chunk)
        return fitting

    def _learn(self, lane: _Lane, chunks: list[TierChunk], outcomes: list[TierOutcome]) -> bool:
        answered = True
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            if outcome is TierOutcome.OK:
                self.counts[lane.tier.name, "saved"] += 1
                continue
            lane.saved.discard(chunk.name.key)
            if outcome is TierOutcome.UNAVAILABLE:
                answered = False
                self._enqueue(lane, [chunk.name.key])
            else:
                self.counts[lane.tier.name, "failed"] += 1
                log_fields(
                    _logger, logging.DEBUG, "tier_declined", tier=lane.tier.name, chunk=chunk.name.text, outcome=outcome
                )
        return answered


class _FillerOfPart:
    """Its sink for one partition of the index."""

    def __init__(self, filler: TierFiller, part: Part) -> None:
        self._filler, self._part = filler, part

    def on_reset(self) -> None:
        self._filler.on_reset(self._part)

    def on_events(self, events: list[Event]) -> None:
        self._filler.on_events(events, self._part)
