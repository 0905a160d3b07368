"""A node's own disk as a tier: one preallocated slab, evicted by a policy, known again after a restart.

Owns whose turn it is to write, and the threads that do. A cache needs no durability: nothing is ever synced, a torn
chunk fails its checksum and is a miss. See `kvstore.tiers.disk_index` for what lies where, `disk_file` for the file.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from kvcore.clock import Clock
from kvcore.config.tiers import DiskTierConfig, TierConfig
from kvcore.errors import TransferError
from kvcore.eviction.evictor import PolicyName
from kvcore.eviction.quotas import TenantShares
from kvcore.extents import aligned
from kvcore.telemetry import log_fields
from kvcore.types import OwnerTag
from kvstore.chunk_format import parse
from kvstore.tiers.base import ChunkName, Cleared, GenerationList, TierChunk, TierOutcome, TierStats
from kvstore.tiers.disk_batch import DiskBatch, HeldChunk
from kvstore.tiers.disk_file import SlabEntry, SlabFile
from kvstore.tiers.disk_index import SlabIndex
from kvstore.tiers.generations import counted
from kvstore.tiers.opening import TierPlace
from transfer.blocking import BatchDeadline, BlockingPool

_log = logging.getLogger(__name__)
_THREADS = 2
"""One or two saturate a disk."""


class DiskTier:
    """See `LocalTier`. Made by `open_disk`, on the loop that uses it."""

    name = "disk"
    shared = False

    def __init__(
        self,
        slab: SlabFile,
        entries: Sequence[SlabEntry],
        clock: Clock,
        eviction: PolicyName,
        *,
        pin_share: float,
        shares: TenantShares | None,
    ) -> None:
        self.on_change: Callable[[Sequence[ChunkName], Sequence[ChunkName]], None] = lambda _came, _left: None
        self.max_chunk_bytes = slab.data_bytes
        self._slab, self._clock = slab, clock
        self._problem: str | None = None
        self._pool = BlockingPool("disk-tier", _THREADS)
        self._writing = asyncio.Lock()
        """One save or removal at a time: a place in the table is given to nobody before it is cleared."""
        self._index = SlabIndex(
            data_offset=slab.data_offset,
            data_bytes=slab.data_bytes,
            num_entries=slab.num_entries,
            entries=entries,
            clock=clock,
            eviction=eviction,
            pin_share=pin_share,
            shares=shares,
        )

    def __repr__(self) -> str:
        return f"<DiskTier {self._slab.path}: {len(self._index.chunks)} chunks, {self._index.extents.used} bytes>"

    def names(self) -> list[ChunkName]:
        """See `LocalTier`: those used last first."""
        return list(reversed(self._index.chunks))

    def owners(self, names: Sequence[ChunkName]) -> list[OwnerTag | None]:
        """See `LocalTier`."""
        return self._index.owners(names)

    def link(self, names: Sequence[ChunkName]) -> None:
        """See `LocalTier`."""
        self._index.link(names)

    def pin(self, names: Sequence[ChunkName], ttl_s: float | None) -> tuple[int, int]:
        """See `LocalTier`."""
        return self._index.pin(names, ttl_s)

    def unpin(self, names: Sequence[ChunkName]) -> int:
        """See `LocalTier`."""
        return self._index.unpin(names)

    def pinned(self, names: Sequence[ChunkName]) -> list[bool]:
        """See `LocalTier`."""
        return self._index.pinned(names)

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`. From memory."""
        return [not self._pool.closed and self._index.alive(name) is not None for name in names]

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`. From memory."""
        if self._pool.closed:
            return [TierOutcome.UNAVAILABLE] * len(names)
        alive = [self._index.alive(name) for name in names]
        return [TierOutcome.MISSING if held is None else held.entry.num_bytes for held in alive]

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`."""
        outcomes = [TierOutcome.UNAVAILABLE] * len(chunks)
        if self._pool.closed:
            return outcomes
        batch = DiskBatch(self._slab)
        for at, chunk in enumerate(chunks):
            held = self._index.alive(chunk.name)
            if held is None:
                outcomes[at] = TierOutcome.MISSING
            elif held.entry.num_bytes != chunk.num_bytes:
                outcomes[at] = TierOutcome.TOO_LARGE
            else:
                held.busy += 1
                batch.work.append((at, held, chunk))
        for _, held, chunk in reversed(batch.work):  # a prefix is to outlive what continues it
            self._index.touch(chunk.name, held)
        await self._run(batch, batch.read, timeout_s)
        for at, came in batch.done.items():
            outcomes[at] = TierOutcome.OK if came else TierOutcome.DAMAGED
        return outcomes

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`."""
        outcomes = [TierOutcome.UNAVAILABLE] * len(chunks)
        end = self._clock.now() + timeout_s
        if not await self._may_write(timeout_s):
            return outcomes
        batch, left = DiskBatch(self._slab), list[ChunkName]()
        try:
            self._plan_save(chunks, ttl_s, batch, left, outcomes)
            await self._run(batch, batch.writing(self._index.to_clear), end - self._clock.now())
        finally:
            came = self._keep_written(batch)
            self._writing.release()
            if came or left:
                self.on_change(came, left)
        written = set(came)
        return [
            TierOutcome.OK if chunk.name in written else outcome
            for chunk, outcome in zip(chunks, outcomes, strict=True)
        ]

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`."""
        left = [name for name in dict.fromkeys(names) if name in self._index.chunks]
        if not left or not await self._may_write(timeout_s):
            return
        batch = DiskBatch(self._slab)
        try:
            for name in left:
                if name in self._index.chunks:
                    self._index.drop(name)
            await self._run(batch, batch.writing(self._index.to_clear), timeout_s)
        finally:
            self._writing.release()
            self.on_change([], left)

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`."""
        if not await self._may_write(timeout_s):
            return 0
        try:
            known = [held for name in dict.fromkeys(names) if (held := self._index.alive(name)) is not None]
            for held in known:
                held.entry.ends_at = 0.0 if ttl_s is None else self._clock.wall() + ttl_s
            batch = DiskBatch(self._slab, entries=[held.entry for held in known])
            await self._run(batch, batch.writing(self._index.to_clear), timeout_s)
            return len(known)
        finally:
            self._writing.release()

    async def generations(self, *, timeout_s: float) -> GenerationList:
        """See `Tier`. From memory."""
        if self._pool.closed:
            return GenerationList(incomplete="it is closed")
        index = [(name, held.entry.num_bytes, held.entry.used_at) for name, held in self._index.chunks.items()]
        return counted(index)

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`. Nobody else looks here."""

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`."""
        names = [name for name in self._index.chunks if name.fingerprint in fingerprints]
        await self.remove(names, timeout_s=timeout_s)
        left = sum(name in self._index.chunks for name in names)
        return Cleared(len(names) - left, f"{self._slab.path} was busy, or is closed" if left else "")

    def stats(self) -> TierStats:
        """See `Tier`."""
        return TierStats(
            num_chunks=len(self._index.chunks),
            used_bytes=self._index.extents.used,
            capacity_bytes=self._index.extents.capacity,
            evicted=self._index.evicted,
            problem=self._problem,
        )

    async def aclose(self) -> None:
        """See `Tier`. When each chunk was used last is written down."""
        if self._pool.closed:
            return
        entries = [held.entry for held in self._index.chunks.values()]
        await self._pool.aclose()
        try:
            await asyncio.to_thread(self._slab.put_entries, entries)
        except OSError as error:
            log_fields(_log, logging.WARNING, "disk_tier_not_written", path=str(self._slab.path), reason=error.strerror)
        self._slab.close()

    async def _may_write(self, timeout_s: float) -> bool:
        """Whether it is this caller's turn to write, which it gives back by releasing `_writing`."""
        if self._pool.closed or timeout_s <= 0:
            return False
        try:
            async with asyncio.timeout(timeout_s):
                await self._writing.acquire()
        except TimeoutError:
            return False
        if self._pool.closed:
            self._writing.release()
            return False
        return True

    def _plan_save(
        self,
        chunks: Sequence[TierChunk],
        ttl_s: float | None,
        batch: DiskBatch,
        left: list[ChunkName],
        outcomes: list[TierOutcome],
    ) -> None:
        """Room for what is not there, after as many evictions as it takes; what needs no writing has its outcome."""
        wall, planned = self._clock.wall(), set[ChunkName]()
        index = self._index
        for at, chunk in reversed(list(enumerate(chunks))):  # a prefix is to outlive what continues it
            if chunk.name in planned:
                continue
            if (held := index.alive(chunk.name)) is not None:
                index.touch(chunk.name, held)
                outcomes[at] = TierOutcome.OK
                continue
            if chunk.name in index.chunks:  # its time was up
                index.drop(chunk.name)
            raw_header = chunk.header()
            owner = header.owner if (header := parse(raw_header)) is not None else None
            if aligned(chunk.num_bytes) > self._slab.data_bytes:
                outcomes[at] = TierOutcome.TOO_LARGE
            elif (offset := index.make_room(chunk.num_bytes, owner, left)) is None:
                outcomes[at] = TierOutcome.FULL
            else:
                planned.add(chunk.name)
                entry = SlabEntry(
                    number=index.free_numbers.pop(),
                    raw_header=raw_header,
                    offset=self._slab.data_offset + offset,
                    num_bytes=chunk.num_bytes,
                    used_at=wall,
                    ends_at=0.0 if ttl_s is None else wall + ttl_s,
                )
                held = HeldChunk(entry, busy=1)
                index.claim(held)
                batch.work.append((at, held, chunk))

    def _keep_written(self, batch: DiskBatch) -> list[ChunkName]:
        """The chunks that a thread has written are in the index from now on; the room of the others is free again."""
        came = []
        for at, held, chunk in batch.work:
            if batch.done.get(at):
                self._index.keep(chunk.name, held)
                came.append(chunk.name)
            else:
                self._index.to_clear.append(held.entry.number)
                self._index.give_back(held)
        return came

    # --- the disk ---

    async def _run(self, batch: DiskBatch, job: Callable[[], None], timeout_s: float) -> None:
        """The job in a thread, which uses the callers' memory no longer when this returns or raises."""
        try:
            if timeout_s > 0 and not self._pool.closed:
                await self._pool.run(job, batch.stop, BatchDeadline(timeout_s))
                self._problem = batch.problem or None
        except TransferError as error:
            self._problem = batch.problem or error.message
        finally:
            for _, held, chunk in reversed(batch.work):  # a prefix is to outlive what continues it
                self._index.done(chunk.name, held)


async def open_tier(config: TierConfig, place: TierPlace, clock: Clock) -> DiskTier:
    """See `kvstore.tiers.opening`."""
    assert isinstance(config, DiskTierConfig)
    path = Path(config.path.replace("{node}", place.node_id), f"kvferry-{place.node_id}.slab")
    return await open_disk(
        path,
        int(config.size),
        clock,
        buffered=config.buffered,
        eviction=config.eviction,
        pin_share=place.pin_share,
        shares=place.shares,
    )


async def open_disk(
    path: Path,
    size_bytes: int,
    clock: Clock,
    *,
    buffered: bool = False,
    eviction: PolicyName = "lru",
    pin_share: float = 0.5,
    shares: TenantShares | None = None,
) -> DiskTier:
    """The tier over the file, which is made if it is not there. `pin_share`, `shares`: of the slab, that pinned chunks,
    and those of each tenant, may take. Raises ConfigError."""

    def start() -> tuple[SlabFile, str, list[SlabEntry]]:
        slab, said = SlabFile.open(path.expanduser(), size_bytes, buffered=buffered)
        return slab, said, list(slab.entries())

    slab, said, entries = await asyncio.to_thread(start)
    if said:
        log_fields(_log, logging.WARNING, "disk_tier", path=str(path), said=said)
    return DiskTier(slab, entries, clock, eviction, pin_share=pin_share, shares=shares)
