"""One batch of reservations and what becomes of them: written, committed, given back.

Owns the reservations from the server's grant on. Invariants: at most one write a key; no byte is written after
`Reserved.write_by`; a place is given back only when no write into it is under way.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from kvcore.clock import Clock
from kvcore.types import ChunkKey, ReplicaRef
from kvstore.background import Background
from kvstore.checksums import run_sized
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack
from kvstore.counters import Count, StoreCounters
from kvstore.placement import Placement, Reserved
from kvstore.routes import Routes
from kvstore.types import Direction, MovedBytes, RunBlocking
from transfer.base import TransferEngine, TransferOp

_CLOSE_S = 2.0
"""Writes still under way have this long to end when the session closes."""


class _State(StrEnum):
    GRANTED = "granted"
    WRITING = "writing"
    WRITTEN = "written"
    COMMITTING = "committing"
    COMMITTED = "committed"
    GONE = "gone"
    """Given back, or lost."""


_BUSY = frozenset({_State.WRITING, _State.COMMITTING})


@dataclass(slots=True)
class _Grant:
    replica: ReplicaRef
    state: _State = _State.GRANTED


@dataclass(frozen=True, slots=True)
class PutContext:
    """What every session of a store shares."""

    fingerprint: bytes
    placement: Placement
    transfer: TransferEngine
    routes: Routes
    background: Background
    clock: Clock
    counters: StoreCounters
    run_blocking: RunBlocking


class PutSession:
    """Made by `KVStore.begin_put`; use it as an async context manager or call `aclose`.

    Writes of different keys may run at the same time, and while a commit runs. `moved` grows by one entry a write.
    """

    def __init__(self, context: PutContext, reserved: Reserved) -> None:
        self.moved: list[MovedBytes] = []
        self._context = context
        self._reserved = reserved
        self._grants = {key: _Grant(replica) for key, replica in reserved.granted.items()}
        self._closed = False
        self._refused = False
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    def wants(self, key: ChunkKey) -> bool:
        """Whether `key` was granted and not yet written, failed or run out: its payload should be written."""
        grant = self._grants.get(key)
        return grant is not None and grant.state is _State.GRANTED and not self._closed and not self._late

    @property
    def stale(self) -> bool:
        """Whether another session may get what this one did not: the metadata server was away when it began, or has
        refused a commit, as it does with all reservations after it has started again."""
        return self._refused or not self._reserved.answered

    @property
    def complete(self) -> frozenset[ChunkKey]:
        """Keys that the store had already when the session began."""
        return self._reserved.complete

    async def write(self, key: ChunkKey, token_count: int, payload: Sequence[memoryview], *, timeout_s: float) -> bool:
        """Write header and payload (of the size that was reserved, gathered from C-contiguous views, unchanged until
        this returns). Raises ValueError for another size.

        False: not wanted, out of time, or the transfer failed (the reservation is given back then). Never raises
        TransferError. The chunk becomes visible by `commit`. A cancelled write gives its reservation back too.
        """
        grant = self._grants.get(key)
        if grant is None or grant.state is not _State.GRANTED or self._closed:
            return False
        num_bytes, wanted = sum(view.nbytes for view in payload), grant.replica.length - HEADER_BYTES
        if num_bytes != wanted:
            raise ValueError(f"room for a chunk of {wanted} bytes was reserved, got {num_bytes}")
        self._set(grant, _State.WRITING)
        written = False
        try:
            written = await self._write(grant.replica, token_count, payload, timeout_s) and not self._closed
        finally:
            self._set(grant, _State.WRITTEN if written else _State.GONE)
            if not written:
                self._context.background.spawn(self._context.placement.abort([grant.replica.id]))
        return written

    async def commit(self, *, timeout_s: float) -> list[ChunkKey]:
        """Commit all that was written and is not committed yet, in one batch; returns the keys that are visible by it.

        A key whose reservation had expired is left out and counted. Metadata server away: nothing is visible and the
        next commit tries again. Never raises for either.
        """
        batch = [(key, grant) for key, grant in self._grants.items() if grant.state is _State.WRITTEN]
        if self._closed or not batch:
            return []
        for _, grant in batch:
            self._set(grant, _State.COMMITTING)
        answers: list[bool] | None = None
        try:
            answers = await self._context.placement.commit([grant.replica.id for _, grant in batch], timeout_s)
        finally:
            for index, (_, grant) in enumerate(batch):
                if answers is None:  # not known: ask again, or give back at the end
                    self._set(grant, _State.WRITTEN)
                else:
                    self._set(grant, _State.COMMITTED if answers[index] else _State.GONE)
        visible = [key for key, grant in batch if grant.state is _State.COMMITTED]
        if answers is not None:
            self._refused |= not all(answers)
            self._context.counters.add(Count.CHUNKS_PUT, len(visible))
            self._context.counters.add(Count.COMMITS_REFUSED, len(batch) - len(visible))
        return visible

    async def aclose(self) -> None:
        """Give back what was reserved and not committed. Idempotent, shielded from cancellation, bounded."""
        if self._closed:
            return
        self._closed = True
        if all(grant.state in {_State.COMMITTED, _State.GONE} for grant in self._grants.values()):
            return
        await asyncio.shield(self._context.background.spawn(self._give_back()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _write(
        self, replica: ReplicaRef, token_count: int, payload: Sequence[memoryview], timeout_s: float
    ) -> bool:
        context = self._context
        deadline = context.clock.now() + timeout_s
        segment = self._reserved.segments[replica.segment_id]
        header = await run_sized(
            context.run_blocking, replica.length - HEADER_BYTES, lambda: self._header(replica, token_count, payload)
        )
        began = context.clock.now()
        if self._late:
            context.counters.add(Count.WRITES_EXPIRED)
            return False
        if began >= deadline or not context.routes.open(segment):
            context.counters.add(Count.WRITES_FAILED)
            return False
        op = TransferOp(segment, replica.offset, [memoryview(header), *payload])
        (error,) = await context.transfer.write([op], min(deadline, self._reserved.write_by) - began)
        context.routes.report(segment, error)
        if error is not None:
            context.counters.add(Count.WRITES_FAILED)
            return False
        seconds = context.clock.now() - began
        moved = MovedBytes(context.routes.transport(segment), Direction.PUT, replica.length, seconds)
        self.moved.append(moved)
        context.counters.add_moved(moved)
        return True

    def _header(self, replica: ReplicaRef, token_count: int, payload: Sequence[memoryview]) -> bytes:
        return pack(
            ChunkHeader(
                key=replica.key,
                fingerprint=self._context.fingerprint,
                token_count=token_count,
                payload_length=replica.length - HEADER_BYTES,
                checksum=checksum(payload),
                generation=replica.generation,
            )
        )

    async def _give_back(self) -> None:
        """Places with a write or commit still under way after _CLOSE_S are left to expire, and counted."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._quiet.wait()
        except TimeoutError:
            self._context.counters.add(Count.LEFT_TO_EXPIRE, self._busy)
        unused = [grant for grant in self._grants.values() if grant.state in {_State.GRANTED, _State.WRITTEN}]
        for grant in unused:
            self._set(grant, _State.GONE)
        await self._context.placement.abort([grant.replica.id for grant in unused])

    @property
    def _late(self) -> bool:
        return self._context.clock.now() >= self._reserved.write_by

    def _set(self, grant: _Grant, state: _State) -> None:
        self._busy += (state in _BUSY) - (grant.state in _BUSY)
        grant.state = state
        if self._busy:
            self._quiet.clear()
        else:
            self._quiet.set()
