"""A tier in this process's memory: for the simulator and tests, with the faults of real ones on request."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence

from kvcore.clock import Clock
from kvcore.types import OwnerTag
from kvstore.chunk_format import parse
from kvstore.tiers.base import ChunkName, Cleared, GenerationList, TierChunk, TierOutcome, TierStats
from kvstore.tiers.generations import GenerationNotes, counted, is_spared


class MemoryTier:
    """See `Tier`. Least recently used chunks go first. Several nodes may have one, as if it were a server.

    `before` is awaited first in each call, with its deadline in seconds, and says whether the tier can be reached: a
    simulation delays calls there, or loses them.
    """

    shared = True
    _AWAY = "it did not answer"

    def __init__(
        self,
        capacity_bytes: int,
        clock: Clock,
        *,
        name: str = "memory",
        max_chunk_bytes: int = 1 << 30,
        before: Callable[[float], Awaitable[bool]] | None = None,
    ) -> None:
        self.name = name
        self.max_chunk_bytes = max_chunk_bytes
        self.chunks: OrderedDict[ChunkName, tuple[bytes, float | None]] = OrderedDict()
        """What it holds: bytes, and when they end. A test may damage them."""
        self._capacity = capacity_bytes
        self._clock = clock
        self._before = before
        self._used = self._evicted = 0
        self._closed = False
        self._notes = GenerationNotes(clock.wall)

    def __repr__(self) -> str:
        return f"<MemoryTier {self.name}: {len(self.chunks)} chunks, {self._used} of {self._capacity} bytes>"

    def owners(self, names: Sequence[ChunkName]) -> list[OwnerTag | None]:
        """See `LocalTier`."""
        headers = (parse(self.chunks[name][0]) if name in self.chunks else None for name in names)
        return [None if header is None else header.owner for header in headers]

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`."""
        reached = await self._reached(timeout_s)
        return [reached and self._alive(name) is not None for name in names]

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`."""
        if not await self._reached(timeout_s):
            return [TierOutcome.UNAVAILABLE] * len(names)
        values = [self._alive(name) for name in names]
        return [TierOutcome.MISSING if value is None else len(value) for value in values]

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`."""
        if not await self._reached(timeout_s):
            return [TierOutcome.UNAVAILABLE] * len(chunks)
        return [self._load(chunk) for chunk in chunks]

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`."""
        if not await self._reached(timeout_s):
            return [TierOutcome.UNAVAILABLE] * len(chunks)
        return [self._save(chunk, ttl_s) for chunk in chunks]

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`."""
        if await self._reached(timeout_s):
            for name in names:
                self._drop(name)

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`."""
        known = 0
        if await self._reached(timeout_s):
            end = None if ttl_s is None else self._clock.now() + ttl_s
            for name in names:
                if (value := self._alive(name)) is not None:
                    self.chunks[name] = (value, end)
                    known += 1
        return known

    async def generations(self, *, timeout_s: float) -> GenerationList:
        """See `Tier`."""
        if not await self._reached(timeout_s):
            return GenerationList(incomplete=self._AWAY)
        alive = [name for name in list(self.chunks) if self._alive(name) is not None]
        return counted(((name, len(self.chunks[name][0]), None) for name in alive), self._notes)

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`."""
        if await self._reached(timeout_s):
            self._notes.mark(fingerprint, owner, note, ttl_s)

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`."""
        if not await self._reached(timeout_s):
            return Cleared(incomplete=self._AWAY)
        cleared = {one for one in fingerprints if not is_spared(self._notes.marks(one), own)}
        names = [name for name in self.chunks if name.fingerprint in cleared]
        for name in names:
            self._drop(name)
        self._notes.forget(cleared)
        return Cleared(len(names))

    def stats(self) -> TierStats:
        """See `Tier`."""
        return TierStats(
            num_chunks=len(self.chunks), used_bytes=self._used, capacity_bytes=self._capacity, evicted=self._evicted
        )

    async def aclose(self) -> None:
        """See `Tier`."""
        self._closed = True

    async def _reached(self, timeout_s: float) -> bool:
        if self._closed:
            return False
        return self._before is None or await self._before(timeout_s)

    def _alive(self, name: ChunkName) -> bytes | None:
        value, end = self.chunks.get(name, (None, None))
        if end is not None and self._clock.now() >= end:
            self._drop(name)
            return None
        return value

    def _drop(self, name: ChunkName) -> None:
        if (held := self.chunks.pop(name, None)) is not None:
            self._used -= len(held[0])

    def _load(self, chunk: TierChunk) -> TierOutcome:
        value = self._alive(chunk.name)
        if value is None:
            return TierOutcome.MISSING
        if len(value) != chunk.num_bytes:
            return TierOutcome.TOO_LARGE
        self.chunks.move_to_end(chunk.name)
        at = 0
        for view in chunk.memory:
            view[:] = value[at : at + view.nbytes]
            at += view.nbytes
        return TierOutcome.OK

    def _save(self, chunk: TierChunk, ttl_s: float | None) -> TierOutcome:
        if chunk.num_bytes > min(self.max_chunk_bytes, self._capacity):
            return TierOutcome.TOO_LARGE
        if self._alive(chunk.name) is not None:
            self.chunks.move_to_end(chunk.name)
            return TierOutcome.OK
        while self._used + chunk.num_bytes > self._capacity:
            self._drop(next(iter(self.chunks)))
            self._evicted += 1
        end = None if ttl_s is None else self._clock.now() + ttl_s
        self.chunks[chunk.name] = (b"".join(chunk.memory), end)
        self._used += chunk.num_bytes
        return TierOutcome.OK
