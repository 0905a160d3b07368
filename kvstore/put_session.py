"""One batch of reservations and what becomes of them: written, committed, given back.

Owns the reservations from the server's grant on. Invariants: at most one write a key; no byte is written after
`Reserved.write_by`; a place is given back only when no write into it is under way.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from kvcore.clock import Clock
from kvcore.types import ChunkKey, ReplicaRef
from kvstore.background import Background
from kvstore.chunk_format import HEADER_BYTES
from kvstore.counters import Count, StoreCounters
from kvstore.placement import Placement, Reserved
from kvstore.types import MovedBytes
from kvstore.writer import ChunkWriter, Outgoing


class _State(StrEnum):
    """Of one reservation:

    | from | to | when |
    |---|---|---|
    | granted | writing | `write_batch` begins |
    | granted | gone | the session closes: given back |
    | writing | written | all bytes are in their place |
    | writing | gone | the transfer failed or was cancelled, or the session closed meanwhile: given back |
    | written | committing | `commit` begins |
    | written | gone | the session closes: given back |
    | committing | committed | the server says so |
    | committing | written | the server was away: asked again, or given back at the end |
    | committing | gone | the server refused it |
    """

    GRANTED = "granted"
    WRITING = "writing"
    WRITTEN = "written"
    COMMITTING = "committing"
    COMMITTED = "committed"
    GONE = "gone"
    """Given back, or lost."""


TRANSITIONS: dict[_State, frozenset[_State]] = {
    _State.GRANTED: frozenset({_State.WRITING, _State.GONE}),
    _State.WRITING: frozenset({_State.WRITTEN, _State.GONE}),
    _State.WRITTEN: frozenset({_State.COMMITTING, _State.GONE}),
    _State.COMMITTING: frozenset({_State.COMMITTED, _State.WRITTEN, _State.GONE}),
    _State.COMMITTED: frozenset(),
    _State.GONE: frozenset(),
}
_BUSY = frozenset({_State.WRITING, _State.COMMITTING})


@dataclass(slots=True)
class _Grant:
    replica: ReplicaRef
    state: _State = _State.GRANTED


@dataclass(frozen=True, slots=True)
class PutContext:
    """What every session of a store shares."""

    placement: Placement
    writer: ChunkWriter
    background: Background
    clock: Clock
    counters: StoreCounters
    close_s: float
    """Writes still under way have this long to end when a session closes."""


@dataclass(frozen=True, slots=True)
class PutChunk:
    """A chunk for `PutSession.write_batch`: `payload` is of the size that was reserved, gathered from C-contiguous
    views that stay unchanged until the call returns."""

    key: ChunkKey
    token_count: int
    payload: Sequence[memoryview]


class PutSession:
    """Made by `KVStore.begin_put`; use it as an async context manager or call `aclose`.

    Writes of different keys may run at the same time, and while a commit runs. `moved` grows by one entry a write and
    segment.
    """

    def __init__(self, context: PutContext, reserved: Reserved, public: frozenset[ChunkKey] = frozenset()) -> None:
        self._public = public
        self.moved: list[MovedBytes] = []
        self._context = context
        self._reserved = reserved
        self._grants = {key: _Grant(replica) for key, replica in reserved.granted.items()}
        self._written: dict[ChunkKey, _Grant] = {}
        """Those that are WRITTEN: a commit must not look at all of a long prompt's."""
        self._closed = False
        self._refused = False
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        counts = Counter(grant.state.value for grant in self._grants.values())
        held = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "nothing granted"
        return f"<PutSession {'closed' if self._closed else 'open'}: {held}>"

    def wants(self, key: ChunkKey) -> bool:
        """Whether `key` was granted and not yet written, failed or run out: its payload should be written."""
        grant = self._grants.get(key)
        return grant is not None and grant.state is _State.GRANTED and not self._closed and not self._late

    @property
    def stale(self) -> bool:
        """Whether another session may get what this one did not, or has no longer: the metadata server was away when it
        began, or has refused a commit, as it does with all reservations after it has started again; or time is up."""
        return self._refused or not self._reserved.answered or self._late

    @property
    def complete(self) -> frozenset[ChunkKey]:
        """Keys that the store had already when the session began."""
        return self._reserved.complete

    @property
    def full(self) -> bool:
        """Whether there was no room for any of the keys that nobody has or is writing: what is computed of them cannot
        be handed over."""
        return self._reserved.full

    def writers(self, key: ChunkKey) -> tuple[str, ...]:
        """The nodes that were writing `key` when the session began, as in a Match."""
        return self._reserved.writers.get(key, ())

    async def write(self, key: ChunkKey, token_count: int, payload: Sequence[memoryview], *, timeout_s: float) -> bool:
        """As `write_batch`, for one chunk."""
        (written,) = await self.write_batch([PutChunk(key, token_count, payload)], timeout_s=timeout_s)
        return written

    async def write_batch(self, chunks: Sequence[PutChunk], *, timeout_s: float) -> list[bool]:
        """Write header and payload of each, all at once. Raises ValueError, before it writes any, for a wrong size.

        False for those that are not wanted, out of time, or whose transfer failed (the reservation is given back then).
        Never raises TransferError. Chunks become visible by `commit`. A cancelled write gives its reservations back.
        """
        # Each chunk is one of three:
        # 1. not granted, written or given back already, or the session is closed: left out, False;
        # 2. of a wrong size: the caller's mistake, and nothing of the whole batch is written;
        # 3. granted: written. A key that is named twice is written once, and both are answered alike.
        batch: dict[ChunkKey, tuple[_Grant, Outgoing]] = {}
        for chunk in chunks:
            grant = self._grants.get(chunk.key)
            if grant is None or grant.state is not _State.GRANTED or self._closed:
                continue
            reserved = grant.replica.length - HEADER_BYTES
            num_bytes = sum(view.nbytes for view in chunk.payload)
            if num_bytes != reserved:
                raise ValueError(f"room for a chunk of {reserved} bytes was reserved, got {num_bytes}")
            owner = None if chunk.key in self._public else self._reserved.owner
            batch.setdefault(chunk.key, (grant, Outgoing(grant.replica, chunk.token_count, chunk.payload, owner)))
        if not batch:
            return [False] * len(chunks)
        for grant, _ in batch.values():
            self._set(grant, _State.WRITING)
        ended = False
        try:
            places = [(self._reserved.segments[out.replica.segment_id], out) for _, out in batch.values()]
            self.moved += await self._context.writer.write(
                places, write_by=self._reserved.write_by, timeout_s=timeout_s
            )
            ended = not self._closed
        finally:  # also when cancelled: what may be half written is given back, and its room rests before it is reused
            lost = []
            for grant, outgoing in batch.values():
                complete = ended and outgoing.written
                self._set(grant, _State.WRITTEN if complete else _State.GONE)
                if not complete:
                    lost.append(grant.replica.id)
            if lost:
                self._context.background.spawn(self._context.placement.abort(lost))
        return [chunk.key in batch and batch[chunk.key][0].state is not _State.GONE for chunk in chunks]

    async def commit(self, *, timeout_s: float) -> list[ChunkKey]:
        """Commit all that was written and is not committed yet, in one batch; returns the keys that are visible by it.

        A key whose reservation had expired is left out and counted. Metadata server away: nothing is visible and the
        next commit tries again. Never raises for either.
        """
        batch = sorted(self._written.items(), key=lambda item: item[1].replica.generation)  # as they were granted
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

    async def _give_back(self) -> None:
        """Places with a write or commit still under way after `close_s` are left to expire, and counted."""
        try:
            async with asyncio.timeout(self._context.close_s):
                await self._idle.wait()
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
        assert state in TRANSITIONS[grant.state], f"{grant} cannot become {state}"
        self._busy += (state in _BUSY) - (grant.state in _BUSY)
        grant.state = state
        if state is _State.WRITTEN:
            self._written[grant.replica.key] = grant
        else:
            self._written.pop(grant.replica.key, None)
        if self._busy:
            self._idle.clear()
        else:
            self._idle.set()
