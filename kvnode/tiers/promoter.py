"""Brings chunks from tiers into this node's segment when a prompt needs them, so that its engine finds them there.

Owns what is under way: one chunk is fetched once, however many ask for it. What is late, missing or damaged is
computed. No byte is written while `work` is paused.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from kvcore.clock import Clock
from kvcore.types import ChunkKey, OwnerTag
from kvnode.tasks import PausableWork
from kvnode.tiers.choice import LoadCosts, choose
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.loader import Loaded, LoadPlan, TierLoader
from kvnode.tiers.own_segment import OwnSegment
from kvnode.tiers.shape import ChunkShape
from kvstore.tiers.base import ChunkName
from kvstore.tiers.guarded import GuardedTier
from kvstore.tiers.rate import RunningRate
from kvstore.types import RunBlocking
from nodeapi.messages import Promoted, PromoteReply, TierChoice, TierUse


class Peers(Protocol):
    """The other nodes' disks: who has which chunk, and how to have it brought into that node's segment."""

    async def holders(self, keys: Sequence[ChunkKey], *, timeout_s: float) -> list[list[str]]:
        """The ids of nodes that have each on their disks; not this node's."""
        ...

    async def promote(
        self, node_id: str, names: Sequence[ChunkName], *, owner: OwnerTag | None = None, timeout_s: float
    ) -> PromoteReply:
        """Have the node do what `TierPromoter.promote` does, of its own tiers alone. `names`: of the first rank."""
        ...


@dataclass(slots=True)
class _Asked:
    """One prompt's promotion. `end`: on the clock. `useless`: nodes that were asked and brought nothing."""

    keys: Sequence[ChunkKey]
    shape: ChunkShape
    end: float
    ask_peers: bool
    choices: list[TierChoice]
    owner: OwnerTag | None
    useless: set[str] = field(default_factory=set)


class TierPromoter:
    """`loader` does the moving; `work` is what is under way."""

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
        """`tiers`: each with its `timeout_s`. `run_blocking` runs checksums."""
        self.prefill_rate = RunningRate()
        """Tokens a second of this node's engine, from its prefills: whoever runs them tells."""
        self._timeouts = {tier.name: timeout_s for tier, timeout_s in tiers}
        self.loader = TierLoader(segment, self._timeouts, clock, run_blocking=run_blocking, limits=limits)
        self.work: PausableWork[list[Promoted]] = PausableWork()
        self._segment, self._clock, self._limits = segment, clock, limits
        self._tiers = [tier for tier, _ in tiers]
        self._peers = peers
        self._under_way: dict[ChunkKey, asyncio.Future[None]] = {}
        self._declined = 0

    def __repr__(self) -> str:
        names = ", ".join(tier.name for tier in self._tiers)
        return f"<TierPromoter from {names} into {self._segment.segment_id}, {len(self._under_way)} chunks under way>"

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        """The loader's, and `computed`: chunks that a tier had and the engine was expected to have sooner."""
        return self.loader.counts

    async def promote(
        self,
        keys: Sequence[ChunkKey],
        shape: ChunkShape,
        *,
        timeout_s: float,
        ask_peers: bool = True,
        choices: list[TierChoice] | None = None,
        owner: OwnerTag | None = None,
    ) -> list[Promoted]:
        """Bring a prompt's chunks here, from its first that is in no segment on, as far as tiers have them in time.

        One entry a tier that gave some. What was chosen, to load or to compute, is added to `choices`. `owner`: whose
        they are. Never raises but for its own cancellation, which lets go of everything.
        """
        if not keys or timeout_s <= 0:
            return []
        end, chosen = self._clock.now() + timeout_s, choices if choices is not None else []
        return await self.work.run(self._promote(_Asked(keys, shape, end, ask_peers, chosen, owner))) or []

    async def promote_names(
        self, tier: GuardedTier, names: Sequence[ChunkName], shape: ChunkShape, owner: OwnerTag | None
    ) -> int:
        """Bring these from `tier`, as far as they are nowhere yet and there is room; how many came. Of no one prompt:
        for a warm-up. Chunks that are shorter than `shape` says stay where they are. `owner`: whose they all are."""
        return sum(one.num_chunks for one in await self.work.run(self._warm(tier, names, shape, owner)) or [])

    async def aclose(self) -> None:
        """End what is under way. Idempotent."""
        await self.work.aclose()

    async def _warm(
        self, tier: GuardedTier, names: Sequence[ChunkName], shape: ChunkShape, owner: OwnerTag | None
    ) -> list[Promoted]:
        wanted = [name for name in names if name.key not in self._under_way]
        plan = LoadPlan(wanted, [[tier]] * len(wanted), one_prompt=False, owner=owner)
        end = self._clock.now() + self._timeouts[tier.name]
        with self._told_under_way(plan):
            return (await self.loader.load(plan, shape.num_bytes, end)).promoted

    async def _promote(self, asked: _Asked) -> list[Promoted]:
        # Four cases of the first chunk that is complete nowhere:
        # 1. it is on its way here already, for another prompt or a warm-up: wait for it, and look again;
        # 2. a tier of this node has it: load it, and all behind it that tiers have;
        # 3. another node's disk has it: have that node promote it into its segment, and look again;
        # 4. nobody has it: it is computed, and so is all behind it.
        # Where what was brought has pushed out what was there already, there is no room for the prompt: case 4.
        done: list[Promoted] = []
        there = -1  # so many were, before something was brought
        names = asked.shape.names(asked.keys)
        while (left_s := asked.end - self._clock.now()) > 0:
            found = await self._segment.num_complete([name.key for name in names], timeout_s=left_s)
            rest = names[found:]
            if not rest or found <= there:
                break
            if (other := self._under_way.get(rest[0].key)) is not None:  # 1
                await asyncio.wait({other}, timeout=left_s)
                continue
            plan = await self._plan(rest, asked, left_s)
            if rest[0].key in self._under_way:  # 1: since a moment ago
                continue
            if plan.names:  # 2
                got = await self._load(plan, asked)
                done += got.promoted
                if got.num_there < len(plan.names):
                    break
                there = found
                continue
            given = await self._from_peers(rest, found, asked) if asked.ask_peers else None
            if given is None:  # 4
                break
            done += given  # 3
            there = found if given else there
        return _merged(done)

    async def _plan(self, names: Sequence[ChunkName], asked: _Asked, left_s: float) -> LoadPlan:
        """Up to the first that no tier has, or that is under way."""
        tiers = sorted((tier for tier in self._tiers if not tier.away), key=lambda tier: -(tier.rate("load") or 1e12))
        find_s = min(left_s, self._find_s(len(names), asked.shape))
        asking = (tier.find(names, timeout_s=min(find_s, self._timeouts[tier.name])) for tier in tiers)
        answers = await asyncio.gather(*asking)
        plan = LoadPlan(owner=asked.owner)
        for at, name in enumerate(names):
            having = [tier for tier, answer in zip(tiers, answers, strict=True) if answer[at]]
            if not having or name.key in self._under_way:
                break
            plan.names.append(name)
            plan.tiers.append(having)
        return plan

    def _find_s(self, num_names: int, shape: ChunkShape) -> float:
        """How long the answer of what is there may take: little beside computing it."""
        limits, rate = self._limits, self.prefill_rate.value
        if rate is None:
            return limits.first_find_s
        return max(limits.find_s, limits.find_share * num_names * shape.chunk_tokens / shape.num_ranks / rate)

    async def _load(self, plan: LoadPlan, asked: _Asked) -> Loaded:
        if not self._chosen(plan, asked):
            return Loaded()
        with self._told_under_way(plan):
            return await self.loader.load(plan, asked.shape.num_bytes, asked.end)

    @contextmanager
    def _told_under_way(self, plan: LoadPlan) -> Iterator[None]:
        """Who asks for these chunks inside of the context waits for its end: room that is reserved for them is given to
        nobody else, so a second load would bring nothing."""
        loop = asyncio.get_running_loop()
        for name in plan.names:
            self._under_way[name.key] = loop.create_future()
        try:
            yield
        finally:
            for name in plan.names:
                if not (waiting := self._under_way.pop(name.key)).done():
                    waiting.set_result(None)

    def _chosen(self, plan: LoadPlan, asked: _Asked) -> bool:
        """Whether to load. Where computing is expected to be faster, one of many is loaded all the same."""
        first, shape, number = plan.tiers[0][0], asked.shape, len(plan.names)
        tokens = number * shape.chunk_tokens // shape.num_ranks
        choice = choose(LoadCosts(number * shape.num_bytes, tokens, first.rate("load"), self.prefill_rate.value))
        use = TierUse.LOAD
        if not choice.load:
            self._declined += 1
            use = TierUse.TRY if self._declined % self._limits.explore == 0 else TierUse.COMPUTE
        if use is TierUse.TRY:
            first.doubt("load")
        if use is TierUse.COMPUTE:
            self.counts[first.name, "computed"] += number
        asked.choices.append(
            TierChoice(tier=first.name, use=use, num_chunks=number, load_s=choice.load_s, compute_s=choice.compute_s)
        )
        return use is not TierUse.COMPUTE

    async def _from_peers(self, rest: Sequence[ChunkName], found: int, asked: _Asked) -> list[Promoted] | None:
        """What one other node brought into its segment; None: there is none to ask. `rest`: all names but the first
        `found`."""
        if self._peers is None:
            return None
        left_s = asked.end - self._clock.now()
        holders = await self._peers.holders([name.key for name in rest], timeout_s=min(left_s, self._limits.find_s))
        runs: Counter[str] = Counter()
        for node_id in holders[0] if holders else ():
            if node_id not in asked.useless:
                runs[node_id] = next((n for n, having in enumerate(holders) if node_id not in having), len(holders))
        if not runs:
            return None
        (node_id, length), *_ = runs.most_common(1)
        ranks = asked.shape.num_ranks
        keys = asked.keys[found // ranks : -(-(found + length) // ranks)]
        wanted = [ChunkName(asked.shape.fingerprint, key) for key in keys]
        left_s = asked.end - self._clock.now()
        if (rate := self.prefill_rate.value) is not None:  # the peer does not know how soon they would be computed here
            left_s = min(left_s, max(self._limits.find_s, len(keys) * asked.shape.chunk_tokens / rate))
        reply = await self._peers.promote(node_id, wanted, owner=asked.owner, timeout_s=left_s)
        asked.choices += reply.choices
        if not reply.promoted:
            asked.useless.add(node_id)
        return reply.promoted


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
