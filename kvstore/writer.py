"""Writing chunks: all of a batch at once, sealed while the bytes pass: with a checksum, and a MAC where there are MACs.

Owns nothing between calls. Invariants: no byte is written at or after `write_by`; a chunk that was written is whole.
Its header goes first, without its seal, and again with it when the payload has landed: who comes to read
meanwhile what lay there before, or this, finds another chunk or a damaged one.

Where chunks are encrypted they are so before a transport sees them, in memory of our own, as the caller's is only read;
a seal is known then, and header and payload go in one round.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from kvcore.clock import Clock
from kvcore.errors import TransferTimeoutError
from kvcore.types import OwnerTag, ReplicaRef, Segment
from kvstore.checksums import run_sized
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, pack
from kvstore.counters import Count, StoreCounters
from kvstore.integrity.checks import Integrity, Sealing
from kvstore.integrity.scratch import Scratch
from kvstore.limits import StoreLimits
from kvstore.routes import Routes
from kvstore.types import Direction, MovedBytes, RunBlocking
from transfer.base import TransferEngine, TransferOp


@dataclass(slots=True)
class Outgoing:
    """A chunk on its way to its place. `payload`: C-contiguous views, unchanged until the write has ended."""

    replica: ReplicaRef
    token_count: int
    payload: Sequence[memoryview]
    owner: OwnerTag | None = None
    sealed: ChunkHeader | None = None
    written: bool = False

    @property
    def payload_bytes(self) -> int:
        """As reserved."""
        return self.replica.length - HEADER_BYTES


@dataclass(slots=True)
class _Batch:
    """What goes to one segment, until when, and how long its transfers took so far. `late`: one was late."""

    segment: Segment
    write_by: float
    deadline: float
    chunks: list[Outgoing]
    seconds: float = 0.0
    late: bool = False


class ChunkWriter:
    """Writes for one KVStore. Any number of writes may run at once, to different places."""

    def __init__(
        self,
        *,
        fingerprint: bytes,
        transfer: TransferEngine,
        routes: Routes,
        clock: Clock,
        counters: StoreCounters,
        integrity: Integrity,
        run_blocking: RunBlocking,
        limits: StoreLimits,
        scratch: Scratch | None = None,
    ) -> None:
        """`scratch`: where chunks are encrypted, if they are."""
        self._scratch = scratch
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        """Slots that writes to one segment may have at a time, while there are any: one that hangs takes no more."""
        self._integrity = integrity
        self._fingerprint = fingerprint
        self._transfer = transfer
        self._routes = routes
        self._clock = clock
        self._counters = counters
        self._run_blocking = run_blocking
        self._limits = limits
        self._silent: set[str] = set()
        """Transports that have not shown what they wrote: it is hashed beside the transfer instead."""

    async def write(
        self, chunks: Sequence[tuple[Segment, Outgoing]], *, write_by: float, timeout_s: float
    ) -> list[MovedBytes]:
        """Write header and payload of each to its segment; sets `written`. Never raises TransferError.

        Returns one entry a segment that got any, or was late with all. Segments do not wait for each other.
        """
        deadline = min(self._clock.now() + timeout_s, write_by)
        batches: dict[str, _Batch] = {}
        for segment, chunk in chunks:
            batches.setdefault(segment.id, _Batch(segment, write_by, deadline, [])).chunks.append(chunk)
        if len(batches) == 1:  # no task: a small batch is all latency
            await self._write(*batches.values())
        else:
            async with asyncio.TaskGroup() as group:
                for batch in batches.values():
                    group.create_task(self._write(batch))
        return [moved for batch in batches.values() if (moved := self._moved(batch))]

    async def _write(self, batch: _Batch) -> None:
        if not self._routes.open(batch.segment):
            self._counters.add(Count.WRITES_FAILED, len(batch.chunks))
            return
        if sum(chunk.payload_bytes for chunk in batch.chunks) <= self._limits.hash_first_bytes:
            ops = [self._op(batch, chunk, hash_now=True) for chunk in batch.chunks]
            landed = await self._send(batch, batch.chunks, ops)
        elif self._scratch is not None:
            landed = await self._encrypt_and_send(batch, self._scratch)
        else:
            landed = await self._send_and_hash(batch)
            headers = [TransferOp(batch.segment, chunk.replica.offset, [self._header(chunk)]) for chunk in landed]
            landed = await self._send(batch, landed, headers)
        for chunk in landed:
            chunk.written = True

    async def _send_and_hash(self, batch: _Batch) -> list[Outgoing]:
        """Those whose payload, and a header without its seal, have landed; their seals are known then."""
        transport = self._routes.transport(batch.segment)
        chunks = batch.chunks
        if transport in self._silent:
            ops = [self._op(batch, chunk) for chunk in chunks]
            landed, _ = await asyncio.gather(self._send(batch, chunks, ops), self._hash(chunks))
            return landed
        passed = [self._integrity.sealing(self._unsealed(chunk)) for chunk in chunks]
        landed = await self._send(
            batch, chunks, [self._op(batch, chunk, running) for chunk, running in zip(chunks, passed, strict=True)]
        )
        for chunk, sealing in zip(chunks, passed, strict=True):
            chunk.sealed = sealing.header()
        unknown = [chunk for chunk in landed if chunk.sealed is None]
        if unknown:
            if len(unknown) == len(landed):
                self._silent.add(transport)
            await self._hash(unknown)
        return landed

    async def _encrypt_and_send(self, batch: _Batch, scratch: Scratch) -> list[Outgoing]:
        """Those that have landed. One group of chunks is encrypted while others move; each goes in one round, as its
        seal is known before."""
        landed = list[Outgoing]()
        began, before = self._clock.now(), batch.seconds

        turn = self._turns.setdefault(batch.segment.id, asyncio.Semaphore(scratch.num_slots))

        async def move(group: Sequence[Outgoing]) -> None:
            async with turn:
                with scratch.slot() as room:
                    ops = await self._encrypted_ops(batch, group, room)
                    landed.extend(await self._send(batch, group, ops))

        async with asyncio.TaskGroup() as moving:
            for group in scratch.groups(batch.chunks, [chunk.payload_bytes for chunk in batch.chunks]):
                moving.create_task(move(group))
        batch.seconds = before + self._clock.now() - began  # they moved side by side
        return landed

    async def _encrypted_ops(self, batch: _Batch, group: Sequence[Outgoing], room: memoryview) -> list[TransferOp]:
        def work() -> list[TransferOp]:
            ops, at = list[TransferOp](), 0
            for chunk in group:
                body = room[at : at + chunk.payload_bytes]
                chunk.sealed = self._integrity.encrypted(self._unsealed(chunk), chunk.payload, body)
                ops.append(TransferOp(batch.segment, chunk.replica.offset, [self._header(chunk), body]))
                at += chunk.payload_bytes
            return ops

        num_bytes = sum(chunk.payload_bytes for chunk in group)
        return await run_sized(self._run_blocking, num_bytes, work, inline_bytes=self._limits.inline_cipher_bytes)

    async def _send(self, batch: _Batch, chunks: Sequence[Outgoing], ops: list[TransferOp]) -> list[Outgoing]:
        """One transfer; those of `chunks` whose op succeeded. The others are counted."""
        now = self._clock.now()
        if now >= batch.write_by:
            self._counters.add(Count.WRITES_EXPIRED, len(chunks))
            return []
        if now >= batch.deadline:
            self._counters.add(Count.WRITES_FAILED, len(chunks))
            return []
        errors = await self._transfer.write(ops, batch.deadline - now)
        batch.seconds += self._clock.now() - now
        for error in errors:
            self._routes.report(batch.segment, error)
            batch.late |= isinstance(error, TransferTimeoutError)
        landed = [chunk for chunk, error in zip(chunks, errors, strict=True) if error is None]
        if len(landed) < len(chunks):
            self._counters.add(Count.WRITES_FAILED, len(chunks) - len(landed))
        return landed

    async def _hash(self, chunks: Sequence[Outgoing]) -> None:
        def work() -> None:
            for chunk in chunks:
                chunk.sealed = self._integrity.seal(self._unsealed(chunk), chunk.payload)

        num_bytes = sum(chunk.payload_bytes for chunk in chunks)
        await run_sized(self._run_blocking, num_bytes, work, inline_bytes=self._limits.inline_hash_bytes)

    def _op(
        self, batch: _Batch, chunk: Outgoing, sealing: Sealing | None = None, *, hash_now: bool = False
    ) -> TransferOp:
        """Header and payload; `hash_now`: the header has its seal at once, and the payload is encrypted if it is to
        be."""
        payload = chunk.payload
        if hash_now and self._integrity.encrypt:
            body = memoryview(bytearray(chunk.payload_bytes))
            chunk.sealed, payload = self._integrity.encrypted(self._unsealed(chunk), payload, body), [body]
        elif hash_now:
            chunk.sealed = self._integrity.seal(self._unsealed(chunk), payload)
        show = None if sealing is None else sealing.show
        return TransferOp(batch.segment, chunk.replica.offset, [self._header(chunk), *payload], show)

    def _header(self, chunk: Outgoing) -> memoryview:
        return memoryview(pack(chunk.sealed or self._unsealed(chunk)))

    def _unsealed(self, chunk: Outgoing) -> ChunkHeader:
        return ChunkHeader(
            key=chunk.replica.key,
            fingerprint=self._fingerprint,
            token_count=chunk.token_count,
            payload_length=chunk.payload_bytes,
            checksum=0,
            generation=chunk.replica.generation,
            owner=chunk.owner,
        )

    def _moved(self, batch: _Batch) -> MovedBytes | None:
        num_bytes = sum(chunk.replica.length for chunk in batch.chunks if chunk.written)
        if not (num_bytes or batch.late):
            return None
        transport = self._routes.transport(batch.segment)
        if not num_bytes:
            late_bytes = sum(chunk.replica.length for chunk in batch.chunks)
            return MovedBytes(transport, Direction.PUT, 0, batch.seconds, late_bytes=late_bytes)
        moved = MovedBytes(transport, Direction.PUT, num_bytes, batch.seconds)
        self._counters.add_moved(moved)
        return moved
