"""Brings chunks from tiers into this node's segment when a prompt needs them, so that its engine finds them there.

Owns what is under way: one chunk is fetched once, however many ask for it. Invariants: only verified chunks become
visible; what is late, missing or damaged is computed; no byte is written while `paused` is entered.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from kvcore.clock import Clock
from kvcore.telemetry import log_fields
from kvcore.types import ChunkKey
from kvnode.tiers.choice import LoadCosts, choose
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.own_segment import OwnSegment, ReservedRoom
from kvstore.chunk_format import HEADER_BYTES
from kvstore.tiers.base import ChunkName, TierChunk, TierOutcome
from kvstore.tiers.guarded import GuardedTier
from kvstore.tiers.rate import RunningRate
from kvstore.types import GetOutcome, RunBlocking
from nodeapi.messages import Promoted

_logger = logging.getLogger("kvnode")


class Peers(Protocol):
    """The other nodes' disks: who has which chunk, and how to have it brought into that node's segment."""

    async def holders(self, keys: Sequence[ChunkKey], *, timeout_s: float) -> list[list[str]]:
        """The ids of nodes that have each on their disks; not this node's."""
        ...

    async def promote(self, node_id: str, names: Sequence[ChunkName], *, timeout_s: float) -> list[Promoted]:
        """Have the node do what `TierPromoter.promote` does, of its own tiers alone."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Of the KV of this node's engine."""

    fingerprint: bytes
    chunk_bytes: int
    """Payload of a full chunk."""
    chunk_tokens: int


@dataclass(slots=True)
class _Plan:
    """Which tiers have each of some names, in order, up to the first that none has."""

    names: list[ChunkName]
    tiers: list[list[GuardedTier]] = field(default_factory=list)


class TierPromoter:
    """`on_promoted` and `on_lost` are told of chunks that a tier turned out to have, or not to have. `run_blocking`
    runs checksums."""

    def __init__(
        self,
        segment: OwnSegment,
        tiers: Sequence[tuple[GuardedTier, float]],
        clock: Clock,
        *,
        run_blocking: RunBlocking,
        peers: Peers | None = None,
        limits: MoveLimits = MoveLimits(),
    ) -> None:
        """`tiers`: each with its `timeout_s`."""
        self.prefill_rate = RunningRate()
        """Tokens a second of this node's engine, from its prefills: whoever runs them tells."""
        self.counts: Counter[tuple[str, str]] = Counter()
        """(tier, what) -> chunks since start: `promoted`, `damaged`, `missing` (found, then not there), `computed` (the
        engine was expected to be faster), `no_room`."""
        self.on_promoted: Callable[[GuardedTier, list[ChunkKey]], None] = lambda _tier, _keys: None
        self.on_lost: Callable[[GuardedTier, list[ChunkKey]], None] = lambda _tier, _keys: None
        self._segment, self._clock, self._limits = segment, clock, limits
        self._timeouts = {tier.name: timeout_s for tier, timeout_s in tiers}
        self._tiers = [tier for tier, _ in tiers]
        self._run_blocking = run_blocking
        self._peers = peers
        self._under_way: dict[ChunkKey, asyncio.Future[None]] = {}
        self._running: set[asyncio.Task[list[Promoted]]] = set()
        self._paused = 0
        self._declined = 0

    def __repr__(self) -> str:
        names = ", ".join(tier.name for tier in self._tiers)
        return f"<TierPromoter from {names} into {self._segment.segment_id}, {len(self._under_way)} chunks under way>"

    async def promote(
        self, keys: Sequence[ChunkKey], shape: ChunkShape, *, timeout_s: float, ask_peers: bool = True
    ) -> list[Promoted]:
        """Bring a prompt's chunks here, from its first that is in no segment on, as far as tiers have them in time.

        One entry a tier that gave some. Never raises but for its own cancellation, which lets go of everything.
        """
        if not keys or timeout_s <= 0:
            return []
        return await self._run(self._promote(keys, shape, self._clock.now() + timeout_s, ask_peers))

    async def promote_names(self, tier: GuardedTier, names: Sequence[ChunkName], shape: ChunkShape) -> int:
        """Bring these from `tier`, as far as they are nowhere yet and there is room; how many came. Of no one prompt:
        for a warm-up. Chunks that are shorter than `shape` says stay where they are."""
        wanted = [name for name in names if name.key not in self._under_way]
        plan = _Plan(wanted, [[tier]] * len(wanted))
        end = self._clock.now() + self._timeouts[tier.name]
        return sum(one.num_chunks for one in await self._run(self._load_in_order(plan, _num_bytes(shape), end)))

    async def _run(self, work: Coroutine[object, object, list[Promoted]]) -> list[Promoted]:
        if self._paused:
            work.close()
            return []
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                task.cancel()
                await asyncio.wait({task})
                raise
            return []  # paused, or closed

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """While it is entered nothing is written, so all that is reserved in the node's name may be given back."""
        self._paused += 1
        try:
            await self._stop()
            yield
        finally:
            self._paused -= 1

    async def aclose(self) -> None:
        """End what is under way. Idempotent."""
        self._paused += 1
        await self._stop()

    async def _stop(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    async def _promote(
        self, keys: Sequence[ChunkKey], shape: ChunkShape, end: float, ask_peers: bool
    ) -> list[Promoted]:
        # Four cases of the first key that is complete nowhere:
        # 1. it is on its way here already, for another prompt: wait for it, and look again;
        # 2. a tier of this node has it: load it, and all behind it that tiers have;
        # 3. another node's disk has it: have that node promote it into its segment, and look again;
        # 4. nobody has it: it is computed, and so is all behind it.
        done: list[Promoted] = []
        asked: set[str] = set()
        while (left_s := end - self._clock.now()) > 0:
            found = await self._segment.num_complete(keys, timeout_s=left_s)
            rest = [ChunkName(shape.fingerprint, key) for key in keys[found:]]
            if not rest:
                break
            if (other := self._under_way.get(rest[0].key)) is not None:  # 1
                await asyncio.wait({other}, timeout=left_s)
                continue
            plan = await self._plan(rest, left_s)
            if rest[0].key in self._under_way:  # 1: since a moment ago
                continue
            if plan.names:  # 2
                got = await self._load(plan, shape, end)
                done += got
                if sum(one.num_chunks for one in got) < len(plan.names):
                    break
                continue
            if not ask_peers or not (got := await self._from_peers(rest, end, asked)):  # 4
                break
            done += got  # 3
        return _merged(done)

    async def _plan(self, names: Sequence[ChunkName], left_s: float) -> _Plan:
        tiers = sorted((tier for tier in self._tiers if not tier.away), key=lambda tier: -(tier.rate("load") or 1e12))
        find_s = min(left_s, self._limits.find_s)
        answers = await asyncio.gather(*(tier.find(names, timeout_s=find_s) for tier in tiers))
        plan = _Plan([])
        for at, name in enumerate(names):
            having = [tier for tier, answer in zip(tiers, answers, strict=True) if answer[at]]
            if not having or name.key in self._under_way:
                break
            plan.names.append(name)
            plan.tiers.append(having)
        return plan

    async def _load(self, plan: _Plan, shape: ChunkShape, end: float) -> list[Promoted]:
        first = plan.tiers[0][0]
        costs = LoadCosts(shape.chunk_bytes, shape.chunk_tokens, first.rate("load"), self.prefill_rate.value)
        if not choose(len(plan.names), costs).load:
            self._declined += 1
            if self._declined % self._limits.explore:
                self.counts[first.name, "computed"] += len(plan.names)
                return []
        loop = asyncio.get_running_loop()
        for name in plan.names:
            self._under_way[name.key] = loop.create_future()
        try:
            return await self._load_in_order(plan, _num_bytes(shape), end)
        finally:
            for name in plan.names:
                if not (waiting := self._under_way.pop(name.key)).done():
                    waiting.set_result(None)

    async def _load_in_order(self, plan: _Plan, num_bytes: int, end: float) -> list[Promoted]:
        """Batch after batch, as what comes after a hole would be computed anyway."""
        done: list[Promoted] = []
        size = max(1, min(self._limits.batch_chunks, self._limits.batch_bytes // num_bytes))
        for start in range(0, len(plan.names), size):
            left_s = end - self._clock.now()
            if left_s <= 0:
                break
            names, tiers = plan.names[start : start + size], plan.tiers[start : start + size]
            room = await self._segment.reserve(names, num_bytes, timeout_s=left_s)
            try:
                got = await self._load_batch(names, tiers, room, end)
            finally:
                await self._segment.give_back(room)
            done += got
            if sum(one.num_chunks for one in got) < len(names):
                break
        return done

    async def _load_batch(
        self, names: list[ChunkName], tiers: list[list[GuardedTier]], room: ReservedRoom, end: float
    ) -> list[Promoted]:
        """From each chunk's fastest tier, then what failed from its next one. Commits the leading ones that came."""
        wanted = [name for name in names if name.key in room.chunks]
        if len(wanted) < len(names):
            missing = [name for name in names if name.key not in room.chunks and name.key not in room.reserved.complete]
            self.counts[tiers[0][0].name, "no_room"] += len(missing)
        came: dict[ChunkKey, GuardedTier] = {}
        began = self._clock.now()
        for nth in range(max(map(len, tiers))):
            by_tier: dict[str, tuple[GuardedTier, list[TierChunk]]] = {}
            for name, having in zip(names, tiers, strict=True):
                if name.key in room.chunks and name.key not in came and nth < len(having):
                    by_tier.setdefault(having[nth].name, (having[nth], []))[1].append(room.chunks[name.key])
            await asyncio.gather(*(self._load_from(tier, chunks, room, came, end) for tier, chunks in by_tier.values()))
        leading: list[ChunkKey] = []
        for name in names:
            if name.key in room.reserved.complete:
                continue
            if name.key not in came:
                break
            leading.append(name.key)
        visible = leading[: await self._segment.commit(room, leading, timeout_s=max(0.1, end - self._clock.now()))]
        seconds, result = self._clock.now() - began, []
        for tier in self._tiers:
            keys = [key for key in visible if came[key] is tier]
            if keys:
                self.counts[tier.name, "promoted"] += len(keys)
                self.on_promoted(tier, keys)
                moved = sum(room.chunks[key].num_bytes for key in keys)
                result.append(Promoted(tier=tier.name, num_chunks=len(keys), num_bytes=moved, seconds=seconds))
        return result

    async def _load_from(
        self,
        tier: GuardedTier,
        chunks: list[TierChunk],
        room: ReservedRoom,
        came: dict[ChunkKey, GuardedTier],
        end: float,
    ) -> None:
        timeout_s = min(end, room.write_by) - self._clock.now()
        if timeout_s <= 0:
            return
        outcomes = await tier.load(chunks, timeout_s=min(timeout_s, self._timeouts[tier.name]))
        damaged, missing = list[ChunkName](), list[ChunkKey]()
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            key = chunk.name.key
            if outcome is TierOutcome.OK:
                checked = await self._run_blocking(partial(self._segment.check, room, key))
                if checked is GetOutcome.OK:
                    came[key] = tier
                    continue
                outcome = TierOutcome.DAMAGED  # noqa: PLW2901
                log_fields(_logger, logging.WARNING, "tier_damaged", tier=tier.name, chunk=chunk.name.text, why=checked)
            if outcome is TierOutcome.DAMAGED:
                damaged.append(chunk.name)
                self.counts[tier.name, "damaged"] += 1
            elif outcome is TierOutcome.MISSING:
                missing.append(chunk.name.key)
                self.counts[tier.name, "missing"] += 1
        if damaged or missing:
            self.on_lost(tier, [*missing, *(name.key for name in damaged)])
            await tier.remove(damaged, timeout_s=self._timeouts[tier.name])

    async def _from_peers(self, rest: Sequence[ChunkName], end: float, asked: set[str]) -> list[Promoted]:
        """What one other node brought into its segment; each node is asked once."""
        if self._peers is None:
            return []
        left_s = end - self._clock.now()
        holders = await self._peers.holders([name.key for name in rest], timeout_s=min(left_s, self._limits.find_s))
        runs: Counter[str] = Counter()
        for node_id in holders[0] if holders else ():
            if node_id not in asked:
                runs[node_id] = next((n for n, having in enumerate(holders) if node_id not in having), len(holders))
        if not runs:
            return []
        (node_id, length), *_ = runs.most_common(1)
        asked.add(node_id)
        return await self._peers.promote(node_id, rest[:length], timeout_s=end - self._clock.now())


def _num_bytes(shape: ChunkShape) -> int:
    return HEADER_BYTES + shape.chunk_bytes


def _merged(parts: Sequence[Promoted]) -> list[Promoted]:
    """One entry a tier and node."""
    total: dict[tuple[str, str], Promoted] = {}
    for part in parts:
        before = total.get((part.tier, part.node), Promoted(tier=part.tier, node=part.node))
        total[part.tier, part.node] = Promoted(
            tier=part.tier,
            node=part.node,
            num_chunks=before.num_chunks + part.num_chunks,
            num_bytes=before.num_bytes + part.num_bytes,
            seconds=before.seconds + part.seconds,
        )
    return list(total.values())
