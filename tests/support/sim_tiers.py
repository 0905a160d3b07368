"""Tiers of simulated nodes: disks that outlive their node's restart, a server that all share, and what befalls them.

Owns what lies on each medium and how well it works now. A node's `NodeTiers` over it are production code.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from support.sim_loop import LoopClock
from support.sim_network import SimProcess

from kvcore.config.tiers import DiskTierConfig, RedisTierConfig, TierConfig, TiersConfig
from kvcore.types import OwnerTag
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.node_tiers import NodeTiers, OpenTier
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, pack, parse
from kvstore.tiers.base import ChunkName, Cleared, GenerationList, TierChunk, TierOutcome, TierStats
from kvstore.tiers.memory import MemoryTier

REDIS = "redis"
_OTHERS = bytes(range(16))
"""A fingerprint of nobody here."""


@dataclass(frozen=True)
class TierPlan:
    """The tiers of a simulated cluster."""

    disks: tuple[str, ...]
    """Nodes that have one."""
    redis: bool
    disk_bytes: int
    redis_bytes: int
    admission: str = "always"
    ttl_s: float | None = None
    timeout_s: float = 1.0
    wait_s: float = 2.0
    warm_up: float = 0.5
    in_flight: int = 1 << 20
    latency_s: float = 0.0005
    """Of each call. A medium serves one after the other."""
    bytes_per_s: float = 10e6
    rot: float = 0.0
    """How much of what is saved is damaged from the start."""
    limits: MoveLimits = MoveLimits()

    def config(self) -> TiersConfig:
        """As a cluster file has it."""
        common = {"admission": self.admission, "ttl_s": self.ttl_s, "timeout_s": self.timeout_s}
        common["in_flight"] = self.in_flight
        disk = DiskTierConfig(path="sim", size=self.disk_bytes, **common) if self.disks else None  # type: ignore[arg-type]
        redis = RedisTierConfig(url="redis://sim", **common) if self.redis else None  # type: ignore[arg-type]
        return TiersConfig(disk=disk, redis=redis, wait_s=self.wait_s, warm_up=self.warm_up)


class Medium:
    """One disk or server. `state`: `ok`, `away` (each call is refused), `slow` (each call is late), `full` (nothing is
    taken)."""

    def __init__(self, name: str, num_bytes: int, plan: TierPlan, clock: LoopClock, dice: random.Random) -> None:
        self.name = name
        self.memory = MemoryTier(num_bytes, clock, name=name)
        self.state = "ok"
        self.well_since = 0.0
        """Since when it is neither away nor slow."""
        self.whole = plan.rot == 0 and plan.ttl_s is None
        """Whether it has kept and taken all that was saved, but for what it evicted."""
        self.calls = 0
        """Under way."""
        self.on_call: Callable[[str, SimProcess], None] = lambda _operation, _process: None
        """Told of each load and save before it moves a byte, and by whom."""
        self._plan, self._clock, self._dice = plan, clock, dice
        self._free_at = 0.0

    @property
    def well(self) -> bool:
        """Whether it answers."""
        return self.state not in ("away", "slow")

    def become(self, state: str) -> None:
        """From now on."""
        was, self.state = self.well, state
        self.whole = self.whole and state != "full"
        if self.well and not was:
            self.well_since = self._clock.now()

    async def busy(self, seconds: float) -> None:
        """One call or chunk after the other."""
        start = max(self._free_at, self._clock.now())
        self._free_at = start + seconds
        await asyncio.sleep(self._free_at - self._clock.now())

    async def reach(self, timeout_s: float) -> bool:
        """Whether a call gets through. One that is late gives up at its deadline, or does not see it."""
        if self.state == "away":
            await asyncio.sleep(0.001)
            return False
        if self.state == "slow":
            await asyncio.sleep(self._dice.choice([timeout_s, 3 * timeout_s + 1]))
            return False
        await self.busy(self._plan.latency_s)
        return True

    async def moved(self, num_bytes: int) -> None:
        """The time that this takes."""
        await self.busy(num_bytes / self._plan.bytes_per_s)

    def lose(self, share: float) -> int:
        """So much of what it holds is gone, and nobody is told."""
        names = [name for name in self.memory.chunks if self._dice.random() < share]
        self.whole = False
        for name in names:
            self.memory._drop(name)
        return len(names)

    def damage(self, share: float) -> int:
        """So much of what it holds is no longer what was saved."""
        names = [name for name in self.memory.chunks if self._dice.random() < share]
        for name in names:
            self.spoil(name)
        return len(names)

    def spoil(self, name: ChunkName) -> None:
        """Damage one."""
        self.whole = False
        value, end = self.memory.chunks[name]
        worse = self._worse(value)
        self.memory._used += len(worse) - len(value)
        self.memory.chunks[name] = worse, end

    def rot(self, name: ChunkName) -> None:
        """What was just saved may be damaged."""
        if self._plan.rot and self._dice.random() < self._plan.rot:
            self.spoil(name)

    def _worse(self, value: bytes) -> bytes:
        header = parse(value[:HEADER_BYTES])
        match self._dice.choice(["flipped", "torn", "foreign", "another", "short"]):
            case "flipped":
                at = self._dice.randrange(len(value))
                return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
            case "torn":
                half = len(value) // 2
                return value[:half] + self._dice.randbytes(len(value) - half)
            case "foreign" if header is not None:
                other = ChunkHeader(
                    header.key, _OTHERS, header.token_count, header.payload_length, header.checksum, header.generation
                )
                return pack(other) + value[HEADER_BYTES:]
            case "another":
                return self._dice.choice(list(self.memory.chunks.values()))[0]
            case _:
                return value[: HEADER_BYTES + 16]


class SimTier:
    """One process's way to a medium, as a `LocalTier`. What a dead process asks is not heard."""

    def __init__(self, medium: Medium, process: SimProcess, *, shared: bool) -> None:
        self.name = medium.name.partition("-")[0]
        self.shared = shared
        self.max_chunk_bytes = 1 << 30
        self.on_change: Callable[[Sequence[ChunkName], Sequence[ChunkName]], None] = lambda _came, _left: None
        self._medium, self._process = medium, process
        self._problem: str | None = None
        self._closed = False

    def names(self) -> list[ChunkName]:
        """See `LocalTier`."""
        return list(reversed(self._medium.memory.chunks))

    def owners(self, names: Sequence[ChunkName]) -> list[OwnerTag | None]:
        """See `LocalTier`."""
        return self._medium.memory.owners(names)

    def link(self, names: Sequence[ChunkName]) -> None:
        """See `LocalTier`. Those used longest ago go, whatever continues them."""

    def pin(self, names: Sequence[ChunkName], ttl_s: float | None) -> tuple[int, int]:
        """See `LocalTier`. It has no room for pins."""
        return 0, len(names)

    def unpin(self, names: Sequence[ChunkName]) -> int:
        """See `LocalTier`."""
        return 0

    def pinned(self, names: Sequence[ChunkName]) -> list[bool]:
        """See `LocalTier`."""
        return [False] * len(names)

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`."""
        if not await self._reached("find", timeout_s):
            return [False] * len(names)
        return await self._medium.memory.find(names, timeout_s=timeout_s)

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`."""
        if not await self._reached("sizes", timeout_s):
            return [TierOutcome.UNAVAILABLE] * len(names)
        return await self._medium.memory.sizes(names, timeout_s=timeout_s)

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`. One chunk after the other, half of it before the other half."""
        if not await self._reached("load", timeout_s):
            return [TierOutcome.UNAVAILABLE] * len(chunks)
        outcomes: list[TierOutcome] = []
        for chunk in chunks:
            view = chunk.memory[0]
            value, _ = self._medium.memory.chunks.get(chunk.name, (b"", None))
            half = min(len(value), view.nbytes) // 2
            view[:half] = value[:half]
            await self._medium.moved(chunk.num_bytes)
            if not self._heard:
                return [*outcomes, *[TierOutcome.UNAVAILABLE] * (len(chunks) - len(outcomes))]
            outcomes += await self._medium.memory.load([chunk], timeout_s=timeout_s)
        return outcomes

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`."""
        if not await self._reached("save", timeout_s):
            return [TierOutcome.UNAVAILABLE] * len(chunks)
        outcomes: list[TierOutcome] = []
        for chunk in chunks:
            before = list(self._medium.memory.chunks)
            await self._medium.moved(chunk.num_bytes)
            if not self._heard:
                return [*outcomes, *[TierOutcome.UNAVAILABLE] * (len(chunks) - len(outcomes))]
            if self._medium.state == "full":
                outcomes.append(TierOutcome.FULL)
                continue
            outcomes += await self._medium.memory.save([chunk], ttl_s=ttl_s, timeout_s=timeout_s)
            now = self._medium.memory.chunks
            if chunk.name in now and chunk.name not in before:
                self._medium.rot(chunk.name)
            self.on_change([chunk.name] if chunk.name in now else [], [name for name in before if name not in now])
        return outcomes

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`."""
        if await self._reached("remove", timeout_s):
            await self._medium.memory.remove(names, timeout_s=timeout_s)
            self.on_change([], names)

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`."""
        if not await self._reached("expire", timeout_s):
            return 0
        return await self._medium.memory.expire(names, ttl_s, timeout_s=timeout_s)

    async def generations(self, *, timeout_s: float) -> GenerationList:
        """See `Tier`."""
        if not await self._reached("generations", timeout_s):
            return GenerationList(incomplete="it does not answer")
        return await self._medium.memory.generations(timeout_s=timeout_s)

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`."""
        if await self._reached("mark", timeout_s):
            await self._medium.memory.mark(fingerprint, owner, note, ttl_s=ttl_s, timeout_s=timeout_s)

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`."""
        if not await self._reached("clear", timeout_s):
            return Cleared(incomplete="it does not answer")
        return await self._medium.memory.clear(fingerprints, own=own, timeout_s=timeout_s)

    def stats(self) -> TierStats:
        """See `Tier`."""
        held = self._medium.memory.stats()
        return TierStats(held.num_chunks, held.used_bytes, held.capacity_bytes, held.evicted, self._problem)

    async def aclose(self) -> None:
        """See `Tier`. What lies on the medium stays."""
        self._closed = True

    @property
    def _heard(self) -> bool:
        return self._process.alive and not self._closed and self._medium.well

    async def _reached(self, operation: str, timeout_s: float) -> bool:
        if self._closed or not self._process.alive:
            return False
        medium = self._medium
        medium.calls += 1
        try:
            reached = await medium.reach(timeout_s)
        finally:
            medium.calls -= 1
        if self._process.alive:
            self._problem = None if reached else "it does not answer"
        if reached and self._process.alive:
            medium.on_call(operation, self._process)
        return reached and self._heard


class SimTiers:
    """All media of a simulated cluster."""

    def __init__(self, plan: TierPlan, clock: LoopClock, seed: int) -> None:
        self.plan, self.config = plan, plan.config()
        self.counts: Counter[str] = Counter()
        """Of all lives of all nodes' tiers: what became of chunks."""
        dice = random.Random(f"tiers {seed}")
        self.disks = {name: Medium(f"disk-{name}", plan.disk_bytes, plan, clock, dice) for name in plan.disks}
        self.redis = Medium(REDIS, plan.redis_bytes, plan, clock, dice) if plan.redis else None

    def media(self) -> dict[str, Medium]:
        """By name: `redis`, or `disk-` and the node."""
        shared = [self.redis] if self.redis is not None else []
        return {medium.name: medium for medium in [*self.disks.values(), *shared]}

    def of(self, node_id: str, process: SimProcess) -> list[tuple[OpenTier, Medium]]:
        """The tiers that a node opens when it starts."""
        opened: list[tuple[OpenTier, Medium]] = []
        if node_id in self.disks:
            opened.append((self._open(self.disks[node_id], process, self.config.disk), self.disks[node_id]))
        if self.redis is not None:
            opened.append((self._open(self.redis, process, self.config.redis), self.redis))
        return opened

    def count(self, tiers: NodeTiers) -> None:
        """What one life of a node's tiers came to."""
        for (_, what), number in (tiers.filler.counts + tiers.promoter.counts).items():
            self.counts[f"tier_{what}"] += number
        if tiers.warmer is not None:
            self.counts["tier_warmed"] += tiers.warmer.promoted_chunks

    def calm(self) -> None:
        """All media are well from now on."""
        for medium in self.media().values():
            medium.become("ok")

    def _open(self, medium: Medium, process: SimProcess, config: TierConfig | None) -> OpenTier:
        assert config is not None
        return OpenTier(SimTier(medium, process, shared=medium is self.redis), config)
