"""The tiers of one node, wired: what a leg finds in them, what fills them, what others ask of them.

Owns their order of start and end. Without tiers in the cluster file there is none of this.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeGuard, TypeVar

import msgspec

from kvcore.chunk_keys import OWNER_BYTES, owner_of, prompt_keys, usable_chunks
from kvcore.clock import Clock
from kvcore.config.tiers import TierConfig, TiersConfig
from kvcore.documents.keys import keys_of_documents
from kvcore.eviction.quotas import TenantShares
from kvcore.types import ChunkKey, KVSpec, NodeInfo, OwnerTag
from kvnode.tasks import cancelled, spawned
from kvnode.tiers.filler import FilledTier, TierFiller
from kvnode.tiers.holdings import HoldingsAnnouncer
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.marker import GenerationMarker
from kvnode.tiers.own_segment import OwnSegment
from kvnode.tiers.pins import DiskPinner
from kvnode.tiers.promoter import Peers, TierPromoter
from kvnode.tiers.shape import ChunkShape
from kvnode.tiers.warmer import TierWarmer, WarmRoom
from kvstore.codecs.tier import CodecTier
from kvstore.placement import Placement
from kvstore.tiers.base import LocalTier, Tier
from kvstore.tiers.guarded import GuardedTier
from kvstore.types import RunBlocking
from metadata_server.client import MetadataClient
from nodeapi.messages import (
    GenerateRequest,
    LegInfo,
    PrefillRequest,
    PrefillResult,
    PromoteReply,
    PromoteRequest,
    TierChoice,
    TierReport,
)

_Leg = TypeVar("_Leg", PrefillRequest, GenerateRequest)


@dataclass(frozen=True, slots=True)
class OpenTier:
    """A tier and what the cluster file says of it."""

    tier: Tier
    config: TierConfig


@dataclass(slots=True)
class NodeTiers:
    """Made by `open_node_tiers`. Its `filler` is to be fed with the metadata server's events."""

    config: TiersConfig
    tiers: list[GuardedTier]
    codecs: list[CodecTier]
    filler: TierFiller
    promoter: TierPromoter
    marker: GenerationMarker
    clock: Clock
    announcer: HoldingsAnnouncer | None = None
    warmer: TierWarmer | None = None
    pinner: DiskPinner | None = None
    local: dict[str, LocalTier] = field(default_factory=dict)
    """By name, those that only this node sees."""
    _shape: ChunkShape | None = field(default=None)

    def engine_ready(self, spec: KVSpec) -> None:
        """The node's engine makes and reads KV of this kind. Raises ConfigError where a tier's codec cannot."""
        for codec in self.codecs:
            codec.use(spec)
        self.marker.use(spec)
        self._shape = ChunkShape.of(spec)
        self.filler.full_bytes.update(dict.fromkeys(self._shape.fingerprints, self._shape.num_bytes))
        if self.warmer is not None:
            self.warmer.start(self._shape)

    def registered(self) -> None:
        """The metadata server has taken the node in, and knows nothing of its disk."""
        if self.announcer is not None:
            self.announcer.tell_all()
        if self.pinner is not None:
            self.pinner.registered()

    @property
    def announced(self) -> bool:
        """Whether others can learn what lies on this node's disk, or never will from a server of this age."""
        return self.announcer is None or self.announcer.told or not self.announcer.can_tell

    async def before_leg(self, request: _Leg) -> tuple[_Leg, PromoteReply]:
        """Bring what tiers have of the prompt into the segment, within `tiers.wait_s` and half of the request's time.
        The request with the time that is left, and what came.

        A leg that waits for another node's chunks gets nothing: that node promotes. Nor does one that reuses nothing.
        """
        shape = self._shape
        if shape is None or (isinstance(request, GenerateRequest) and (request.handoff or not request.reuse)):
            return request, PromoteReply()
        began, choices = self.clock.now(), list[TierChoice]()
        prompt = request.prompt_token_ids
        keys = prompt_keys(shape.fingerprint, request.cache_salt, prompt, shape.chunk_tokens)
        apart: list[list[ChunkKey]] = []
        if (said := request.documents) is not None:
            apart = keys_of_documents(
                shape.fingerprint, request.cache_salt, prompt, said.header, said.spans, chunk_tokens=shape.chunk_tokens
            )
        wanted = [keys[: usable_chunks(len(prompt), shape.chunk_tokens)], *apart]
        for chain in [keys, *apart]:
            names = shape.names(chain)
            self.filler.on_asked(name.key for name in names)
            for tier in self.local.values():
                tier.link(names)
        timeout_s = min(self.config.wait_s, request.deadline_s / 2)
        owner = owner_of(request.cache_salt)
        came = [
            self.promoter.promote(chain, shape, timeout_s=timeout_s, choices=choices, owner=owner) for chain in wanted
        ]
        promoted = [one for some in await asyncio.gather(*came) for one in some]
        left_s = max(0.001, request.deadline_s - (self.clock.now() - began))
        return msgspec.structs.replace(request, deadline_s=left_s), PromoteReply(promoted=promoted, choices=choices)

    def after_leg(self, told: PrefillResult | LegInfo) -> None:
        """Learn the engine's speed, from a leg that computed a chunk at least: for less most time is overhead."""
        if self._shape is not None and told.computed_tokens >= self._shape.chunk_tokens:
            self.promoter.prefill_rate.observe(told.computed_tokens, told.timings.compute_s)

    async def promote(self, request: PromoteRequest) -> PromoteReply:
        """What another node asks for. Only KV of this node's engine: of others it does not know the size."""
        shape = self._shape
        if shape is None or shape.fingerprint != request.fingerprint:
            return PromoteReply()
        keys = [ChunkKey(key) for key in request.keys]
        timeout_s, choices = min(self.config.wait_s, request.deadline_s), list[TierChoice]()
        said = request.owner
        owner = OwnerTag(said) if isinstance(said, bytes) and len(said) == OWNER_BYTES else None
        promoted = await self.promoter.promote(
            keys, shape, timeout_s=timeout_s, ask_peers=False, choices=choices, owner=owner
        )
        return PromoteReply(promoted=promoted, choices=choices)

    def reports(self) -> list[TierReport]:
        """For /v1/info."""
        return [self._report(tier) for tier in self.tiers]

    def _report(self, tier: GuardedTier) -> TierReport:
        stats = tier.stats()
        counts = self.filler.counts + self.promoter.counts
        return TierReport(
            name=tier.name,
            shared=tier.shared,
            num_chunks=stats.num_chunks,
            used_bytes=stats.used_bytes,
            capacity_bytes=stats.capacity_bytes,
            problem=stats.problem or "",
            counts={what: number for (name, what), number in counts.items() if name == tier.name},
            evicted=stats.evicted,
            load_rate=tier.rate("load"),
            save_rate=tier.rate("save"),
        )


@asynccontextmanager
async def open_node_tiers(
    opened: Sequence[OpenTier],
    config: TiersConfig,
    *,
    shares: TenantShares | None = None,
    node: NodeInfo,
    host_id: str = "",
    segment: OwnSegment,
    placement: Placement,
    metadata: MetadataClient,
    clock: Clock,
    run_blocking: RunBlocking,
    peers: Peers | None,
    limits: MoveLimits = MoveLimits(),
) -> AsyncIterator[NodeTiers]:
    """Takes over the closing of the tiers and of `placement`. Their tasks run until it is left. `shares`: of the
    segment, that tenants' chunks may take."""
    async with AsyncExitStack() as stack:
        stack.push_async_callback(placement.aclose, limits.close_s)
        guards, codecs = list[GuardedTier](), list[CodecTier]()
        for one in opened:
            codec = CodecTier(one.tier, one.config.codec, segment.integrity, encrypt=one.config.encrypt)
            guard = GuardedTier(codec, clock, in_flight_bytes=int(one.config.in_flight))
            stack.push_async_callback(guard.aclose)
            codecs.append(codec)
            guards.append(guard)
        filled = [
            FilledTier(guard, one.config.admission, one.config.ttl_s, one.config.timeout_s)
            for guard, one in zip(guards, opened, strict=True)
        ]
        filler = TierFiller(segment, filled, limits)
        timeouts = [(guard, one.config.timeout_s) for guard, one in zip(guards, opened, strict=True)]
        promoter = TierPromoter(segment, timeouts, clock, run_blocking=run_blocking, peers=peers, limits=limits)
        promoter.loader.on_promoted, promoter.loader.on_lost = filler.on_promoted, filler.on_lost
        stack.push_async_callback(promoter.aclose)
        marker = GenerationMarker(guards, node, host_id, limits)
        stack.push_async_callback(marker.aclose)
        tiers = NodeTiers(config, guards, codecs, filler, promoter, marker, clock)
        work = [(filler.run(), "fill"), (marker.run(), "mark")]
        for one, guard in zip(opened, guards, strict=True):
            if is_local(one.tier):
                tiers.announcer = HoldingsAnnouncer(metadata, node, one.tier.names, limits)
                one.tier.on_change = tiers.announcer.changed
                tiers.local[one.tier.name] = one.tier
                tiers.pinner = DiskPinner(metadata, one.tier, limits)
                room = WarmRoom(segment.size_bytes, config.warm_up, shares or TenantShares())
                tiers.warmer = TierWarmer(promoter, guard, one.tier, room, limits)
                work += [(tiers.announcer.run(), "announce"), (tiers.warmer.run(), "warm-up")]
                work.append((tiers.pinner.run(), "pin"))
        tasks = [spawned(one, f"{name}-{node.id}") for one, name in work]
        stack.push_async_callback(cancelled, *tasks)
        yield tiers


def is_local(tier: Tier) -> TypeGuard[LocalTier]:
    """Whether only this node sees what lies in the tier."""
    return not tier.shared
