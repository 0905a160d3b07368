"""What operators ask of one node about chunks: which generations lie here, and orders about chunks in its tiers.

Owns nothing. The segment is looked at, not touched: what lies in segments is the metadata server's to decide.
"""

import asyncio
from collections.abc import Iterable, Sequence

from kvcore.types import ChunkKey
from kvnode.tiers.node_tiers import NodeTiers
from kvstore.chunk_format import HEADER_BYTES, parse
from kvstore.manifest import scan
from kvstore.tiers.base import ChunkName, GenerationList, LocalTier
from kvstore.tiers.guarded import GuardedTier
from nodeapi.upkeep import (
    ChunksPlace,
    ChunksReply,
    ChunksRequest,
    ClearedPlace,
    ClearReply,
    ClearRequest,
    GenerationHeld,
    GenerationMarked,
    GenerationsPlace,
    GenerationsReply,
    GenerationsRequest,
)

MEMORY = "memory"
_NO_LIST = "this kind of tier cannot list what lies in it"


class NodeUpkeep:
    """Answers the calls of `nodeapi.upkeep`. `view`: the segment's memory."""

    def __init__(self, view: memoryview, tiers: NodeTiers | None) -> None:
        self._view, self._tiers = view, tiers

    async def generations(self, request: GenerationsRequest) -> GenerationsReply:
        """What lies in the segment and in the tiers that are named."""
        places = [await asyncio.to_thread(_in_segment, self._view)]
        named = self._named(request.tiers)
        listed = await asyncio.gather(*(tier.generations(timeout_s=request.deadline_s) for tier in named))
        places += [_place(tier, found) for tier, found in zip(named, listed, strict=True)]
        return GenerationsReply(places=places, owner=self._tiers.marker.owner if self._tiers is not None else "")

    async def chunks(self, request: ChunksRequest) -> ChunksReply:
        """Carry an order out in each tier that is named."""
        names = [ChunkName(request.fingerprint, ChunkKey(key)) for key in request.keys]
        if request.action == "remove" and self._tiers is not None:
            self._tiers.filler.forget([name.key for name in names])
        named = self._named(request.tiers)
        if request.action in ("pin", "unpin"):  # what lies in a shared tier is not this cluster's alone to keep
            local = self._tiers.local if self._tiers is not None else {}
            return ChunksReply(places=[_pins(local[tier.name], names, request) for tier in named if tier.name in local])
        return ChunksReply(places=list(await asyncio.gather(*(self._order(tier, names, request) for tier in named))))

    async def clear(self, request: ClearRequest) -> ClearReply:
        """Remove generations from the tiers that are named."""
        named = self._named(request.tiers)
        cleared = await asyncio.gather(
            *(tier.clear(request.fingerprints, own=request.own, timeout_s=request.deadline_s) for tier in named)
        )
        if self._tiers is not None:
            self._tiers.filler.forget(None)
        places = zip(named, cleared, strict=True)
        return ClearReply(
            places=[
                ClearedPlace(name=tier.name, shared=tier.shared, num_chunks=one.num_chunks, incomplete=one.incomplete)
                for tier, one in places
            ]
        )

    async def _order(self, tier: GuardedTier, names: Sequence[ChunkName], request: ChunksRequest) -> ChunksPlace:
        timeout_s, problem = request.deadline_s, ""
        found: list[bool] = []
        num_chunks = 0
        if request.action in ("find", "remove"):
            found = await tier.find(names, timeout_s=timeout_s)
            num_chunks = sum(found)
        if request.action == "remove":
            local = self._tiers.local.get(tier.name) if self._tiers is not None else None
            pinned = local.pinned(names) if local is not None else [False] * len(names)
            await tier.remove(
                [name for name, stays in zip(names, pinned, strict=True) if not stays], timeout_s=timeout_s
            )
            left = sum(await tier.find(names, timeout_s=timeout_s))
            num_chunks, found = num_chunks - left, []
            problem = f"{sum(pinned)} chunks are pinned" if any(pinned) else ""
            problem = f"{left} chunks could not be removed" if left > sum(pinned) else problem
        elif request.action == "expire":
            num_chunks = await tier.expire(names, request.ttl_s, timeout_s=timeout_s)
        problem = problem or tier.stats().problem or ""
        return ChunksPlace(name=tier.name, shared=tier.shared, found=found, num_chunks=num_chunks, problem=problem)

    def _named(self, names: Iterable[str]) -> list[GuardedTier]:
        wanted = set(names)
        return [tier for tier in self._tiers.tiers if tier.name in wanted] if self._tiers is not None else []


def _pins(tier: LocalTier, names: Sequence[ChunkName], request: ChunksRequest) -> ChunksPlace:
    if request.action == "unpin":
        return ChunksPlace(name=tier.name, num_chunks=tier.unpin(names))
    kept, refused = tier.pin(names, request.ttl_s)
    why = f"{refused} chunks were not pinned: pins have their share of the {tier.name} already (store.pin_share)"
    return ChunksPlace(name=tier.name, num_chunks=kept, problem=why if refused else "")


def _in_segment(view: memoryview) -> GenerationsPlace:
    """By the chunks' headers, those included that were evicted and not overwritten. Blocks."""
    keys: dict[bytes, list[bytes]] = {}
    num_bytes: dict[bytes, int] = {}
    for entry in scan(view):
        header = parse(view[entry.offset : entry.offset + HEADER_BYTES])
        if header is not None and header.key == entry.key:
            keys.setdefault(header.fingerprint, []).append(header.key)
            num_bytes[header.fingerprint] = num_bytes.get(header.fingerprint, 0) + entry.length
    held = [
        GenerationHeld(fingerprint=one, num_chunks=len(found), num_bytes=num_bytes[one], keys=found)
        for one, found in sorted(keys.items())
    ]
    return GenerationsPlace(name=MEMORY, held=held)


def _place(tier: GuardedTier, listed: GenerationList | None) -> GenerationsPlace:
    listed = listed or GenerationList(incomplete=_NO_LIST)
    held = [
        GenerationHeld(
            fingerprint=one.fingerprint,
            num_chunks=one.num_chunks,
            num_bytes=one.num_bytes,
            note=one.note,
            marks=[GenerationMarked(owner=mark.owner, until=mark.until) for mark in one.marks],
            used=one.used,
        )
        for one in listed.found
    ]
    return GenerationsPlace(name=tier.name, shared=tier.shared, held=held, incomplete=listed.incomplete)
