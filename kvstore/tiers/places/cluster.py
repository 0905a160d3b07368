"""A Redis Cluster as one tier: a Redis tier for each master, each chunk at the one that has its slot.

Owns whom each chunk is asked of, and what a node says of who has it now. All parts of a chunk have one hash tag, so one
slot, so one node. A node that is away is a miss for its chunks alone; each has a breaker of its own.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from kvcore.clock import Clock
from kvstore.tiers.base import ChunkName, Cleared, Generation, GenerationList, Tier, TierChunk, TierOutcome, TierStats
from kvstore.tiers.generations import is_spared
from kvstore.tiers.guarded import GuardedTier
from kvstore.tiers.limits import RedisLimits
from kvstore.tiers.places.discovery import ClusterSlots, ServerPlace
from kvstore.tiers.places.redis_url import RespServer, at
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_parts import part_key
from kvstore.tiers.resp_client import RespClient

_Answer = TypeVar("_Answer")
_ANY_BYTES = 1 << 62  # whoever uses the whole tier bounds what is under way

_SHARE = 0.9  # of the time that is left: nodes that are late leave time to hand over what the others gave

_Ask = Callable[[Tier, list[int], float], Awaitable[None]]
"""Asks a tier for those at these positions of a call, within so many seconds."""


@dataclass(frozen=True, slots=True)
class _ClusterNode:
    """A master; and it again, to be asked for slots that it is about to get."""

    tier: RedisTier
    guarded: GuardedTier
    """The same."""
    asking: RedisTier


def redis_tier(server: ServerPlace, connections: int, clock: Clock, limits: RedisLimits = RedisLimits()) -> RedisTier:
    """The tier in one server, whichever that is at the time."""
    chunks, questions, errands = (RespClient(server, number) for number in (connections, 1, 1))
    return RedisTier(chunks, questions, limits, errands=errands, clock=clock)


class RedisClusterTier:
    """See `Tier`."""

    name = "redis"
    shared = True

    def __init__(
        self, slots: ClusterSlots, connections: int, clock: Clock, limits: RedisLimits = RedisLimits()
    ) -> None:
        """`connections`: to each master, for chunks."""
        self.max_chunk_bytes = limits.max_chunk_bytes
        self._slots, self._connections, self._clock, self._limits = slots, connections, clock, limits
        self._nodes: dict[RespServer, _ClusterNode] = {}
        self._asks: dict[int, RespServer] = {}
        """Slot -> who is about to get it."""
        self._redirections = 0
        self._redirected: dict[int, int] = {}
        """Slot -> number of the last redirection that was for it."""
        self._lost: str | None = None
        """Why nobody says who has which slot."""
        self._closed = False

    def __repr__(self) -> str:
        return f"<RedisClusterTier {self._slots.shown}: {self.stats().problem or 'well'}>"

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`."""

        def find(tier: Tier, positions: list[int], left_s: float) -> Awaitable[list[bool]]:
            return tier.find([names[one] for one in positions], timeout_s=left_s)

        return await self._answered(names, False, find, timeout_s)

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`."""
        unknown: int | TierOutcome = TierOutcome.UNAVAILABLE

        def sizes(tier: Tier, positions: list[int], left_s: float) -> Awaitable[list[int | TierOutcome]]:
            return tier.sizes([names[one] for one in positions], timeout_s=left_s)

        return await self._answered(names, unknown, sizes, timeout_s)

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`."""

        def load(tier: Tier, positions: list[int], left_s: float) -> Awaitable[list[TierOutcome]]:
            return tier.load([chunks[one] for one in positions], timeout_s=left_s)

        return await self._answered(_names(chunks), TierOutcome.UNAVAILABLE, load, timeout_s)

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`."""

        def save(tier: Tier, positions: list[int], left_s: float) -> Awaitable[list[TierOutcome]]:
            return tier.save([chunks[one] for one in positions], ttl_s=ttl_s, timeout_s=left_s)

        outcomes = await self._answered(_names(chunks), TierOutcome.UNAVAILABLE, save, timeout_s)
        return [TierOutcome.UNAVAILABLE if one is TierOutcome.MISSING else one for one in outcomes]

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`."""

        async def ask(tier: Tier, positions: list[int], left_s: float) -> None:
            await tier.remove([names[one] for one in positions], timeout_s=left_s)

        await self._routed(names, ask, timeout_s)

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`."""
        known = 0

        async def ask(tier: Tier, positions: list[int], left_s: float) -> None:
            nonlocal known
            of_one = await tier.expire([names[one] for one in positions], ttl_s, timeout_s=left_s)
            known += of_one  # in a step of its own: others add to it meanwhile

        await self._routed(names, ask, timeout_s)
        return known

    async def generations(self, *, timeout_s: float) -> GenerationList:
        """See `Tier`. Of all nodes together."""
        lists = await self._of_all(lambda tier: tier.generations(timeout_s=timeout_s, noted_too=True), timeout_s)
        if not lists:
            return GenerationList(incomplete=self._lost or "no node is known")
        merged = _merged(lists)
        return replace(merged, found=tuple(one for one in merged.found if one.num_chunks))

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`. Each node takes what is of its own slots."""
        await self._of_all(
            lambda tier: tier.mark(fingerprint, owner, note, ttl_s=ttl_s, timeout_s=timeout_s), timeout_s
        )

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`. Marks lie on one node, the chunks that they spare on all."""
        end = self._clock.now() + timeout_s
        chosen = list(fingerprints)
        if own is not None:
            half_s = timeout_s / 2
            listed = _merged(
                await self._of_all(lambda tier: tier.generations(timeout_s=half_s, noted_too=True), half_s)
            )
            if listed.incomplete or self._lost:
                return Cleared(incomplete=listed.incomplete or self._lost or "")
            spared = {one.fingerprint for one in listed.found if is_spared(one.marks, own)}
            chosen = [one for one in chosen if one not in spared]
        left_s = end - self._clock.now()
        everybody = _Everybody()  # who spares nothing, and has each node forget its marks
        cleared = await self._of_all(lambda tier: tier.clear(chosen, own=everybody, timeout_s=left_s), left_s)
        if not cleared:
            return Cleared(incomplete=self._lost or "no node is known")
        incomplete = next((one.incomplete for one in cleared if one.incomplete), "")
        return Cleared(sum(one.num_chunks for one in cleared), incomplete)

    def stats(self) -> TierStats:
        """See `Tier`. `partly`: some nodes are well."""
        masters = self._slots.masters()
        problems = [node.guarded.stats().problem for server in masters if (node := self._nodes.get(server))]
        wrong = [problem for problem in problems if problem is not None]
        if self._lost is not None and not masters:
            return TierStats(problem=self._lost)
        return TierStats(problem=wrong[0] if wrong else None, partly=bool(wrong) and len(wrong) < len(masters))

    async def aclose(self) -> None:
        """See `Tier`."""
        self._closed = True
        for server in list(self._nodes):
            await self._nodes[server].guarded.aclose()

    # --- whom to ask ---

    async def _answered(
        self,
        names: Sequence[ChunkName],
        otherwise: _Answer,
        call: Callable[[Tier, list[int], float], Awaitable[list[_Answer]]],
        timeout_s: float,
    ) -> list[_Answer]:
        """What each name's node answers of it; `otherwise` of those whose node does not."""
        answers = [otherwise] * len(names)

        async def ask(tier: Tier, positions: list[int], left_s: float) -> None:
            for position, answer in zip(positions, await call(tier, positions, left_s), strict=True):
                answers[position] = answer

        await self._routed(names, ask, timeout_s)
        return answers

    async def _routed(self, names: Sequence[ChunkName], ask: _Ask, timeout_s: float) -> None:
        """Ask each node for its own; those that it says are elsewhere, there."""
        end = self._clock.now() + timeout_s
        if not names or not await self._known(timeout_s):
            return
        slots = [self._slots.slot(part_key(name, 0)) for name in names]
        before = self._redirections
        left: Iterable[int] = range(len(names))
        for _ in range(1 + self._limits.redirections):
            shares: dict[int, tuple[Tier, list[int]]] = {}
            for position in left:
                tier = self._tier_of(slots[position], before)
                if tier is not None:
                    shares.setdefault(id(tier), (tier, []))[1].append(position)
            before, left_s = self._redirections, _SHARE * (end - self._clock.now())
            if not shares or left_s <= 0:
                break
            async with asyncio.TaskGroup() as group:
                for tier, positions in shares.values():
                    group.create_task(_awaited(ask(tier, positions, left_s)))
            asked = [position for _, positions in shares.values() for position in positions]
            left = [position for position in asked if self._redirected.get(slots[position], 0) > before]
        if self.stats().problem is not None:
            self._slots.forget()

    async def _known(self, timeout_s: float) -> bool:
        """Whether it is known who has which slot, asked for if need be."""
        if self._closed or timeout_s <= 0:
            return False
        try:
            await self._slots.refresh(timeout_s)
            self._lost = None
        except OSError as error:
            self._lost = f"{self._slots.shown}: {error or 'no node answered in time'}"
        masters = self._slots.masters()
        for server in self._nodes.keys() - {*masters, *self._asks.values()}:
            await self._nodes.pop(server).guarded.aclose()
        return bool(masters) and not self._closed

    def _tier_of(self, slot: int, before: int) -> Tier | None:
        """Who has it; None: nobody has. One that was named since that redirection as about to get it comes first."""
        going_to = self._asks.get(slot)
        if going_to is not None and self._redirected[slot] > before:
            return self._node(going_to).asking
        master = self._slots.master(slot)
        return self._node(master).guarded if master is not None else None

    def _node(self, server: RespServer) -> _ClusterNode:
        node = self._nodes.get(server)
        if node is None:
            clients = [RespClient(server, number) for number in (self._connections, 1, 1)]
            for client in clients:
                client.on_elsewhere = partial(self._elsewhere, server)
            chunks, questions, errands = clients
            tier = RedisTier(chunks, questions, self._limits, errands=errands, clock=self._clock)
            asking = RedisTier(chunks, questions, self._limits, errands=errands, clock=self._clock, asking=True)
            node = _ClusterNode(tier, GuardedTier(tier, self._clock, in_flight_bytes=_ANY_BYTES), asking)
            self._nodes[server] = node
        return node

    def _elsewhere(self, server: RespServer, text: str) -> None:
        """`MOVED SLOT HOST:PORT` or `ASK SLOT HOST:PORT`; without a host, it is that of who says so."""
        with suppress(ValueError):
            word, number, place = text.split(" ")[:3]
            host, _, port = place.rpartition(":")
            target, slot = at(server, host or server.host, int(port)), int(number)
            if word == "MOVED":
                self._asks.pop(slot, None)
                self._slots.moved(slot, target)
            else:
                self._asks[slot] = target
            self._redirections += 1
            self._redirected[slot] = self._redirections

    async def _of_all(self, call: Callable[[RedisTier], Awaitable[_Answer]], timeout_s: float) -> list[_Answer]:
        """What each master answers; empty where none is known."""
        if not await self._known(timeout_s):
            return []
        tiers = [self._node(server).tier for server in self._slots.masters()]
        return list(await asyncio.gather(*(call(tier) for tier in tiers)))


class _Everybody(Collection[str]):
    """All owners that there may be."""

    def __contains__(self, owner: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


async def _awaited(work: Awaitable[None]) -> None:
    await work


def _merged(lists: Sequence[GenerationList]) -> GenerationList:
    """Of several servers that each have a part."""
    found: dict[bytes, Generation] = {}
    for one in (one for listed in lists for one in listed.found):
        old = found.setdefault(one.fingerprint, replace(one, num_chunks=0, num_bytes=0, marks=()))
        found[one.fingerprint] = replace(
            old,
            num_chunks=old.num_chunks + one.num_chunks,
            num_bytes=old.num_bytes + one.num_bytes,
            note=old.note or one.note,
            marks=tuple({mark.owner: mark for mark in (*old.marks, *one.marks)}.values()),
        )
    incomplete = next((listed.incomplete for listed in lists if listed.incomplete), "")
    return GenerationList(tuple(found[one] for one in sorted(found)), incomplete)


def _names(chunks: Sequence[TierChunk]) -> list[ChunkName]:
    return [chunk.name for chunk in chunks]
