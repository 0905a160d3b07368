"""Shared memory: segments of processes on the same host, mapped once and then copied to and from directly.

Owns the mappings. Before each read and after each write it checks that the owner still holds the segment, so a write
to a dead owner's memory is an error; if the owner dies later, readers find out, as with every transport. Several
threads copy a large batch: one alone does not use the memory's whole rate, least of all if it computes checksums too.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvcore.clock import SystemClock
from kvcore.errors import PeerUnreachableError, TransferError
from kvcore.types import Segment
from transfer.base import Direction, TransferOp
from transfer.blocking import BatchDeadline, BlockingPool
from transfer.memory.copying import Copy, copy, copy_holding_lock, streaming_copy, streams_above_bytes
from transfer.memory.pages import usable_cpus
from transfer.memory.segment import AttachedSegment, attach
from transfer.ranges import byte_views, check_batch, range_error
from transfer.stripes import groups

_INLINE_BYTES = 1 << 20
"""Up to here a copy (30 us from the cache, 90 from memory) takes less than the hop to a thread and back (110 us)."""
_SLICE_BYTES = 4 << 20
"""A large copy looks at its stop flag this often: about 0.5 ms; slower in smaller slices, not faster in larger ones."""
_SHOWN_BYTES = 1 << 20
"""Slices of a copy whose caller is shown each at once. 64 MiB with a checksum: 5.9 ms; 6.9 in slices of 4 MiB, which
have left the cache, and 7.5 with the checksum after the copy."""
_GATHERED_VIEWS = 16
"""Of so many buffers in one slice, 64 KiB each or less, two threads would wait for the interpreter's lock with each. By
way of a buffer of ours a read of 64 MiB with a MAC took, on a busy machine, 12 ms in place of 24 (of 64 KiB each), and
18 in place of 50 (of 16); of 128 KiB each it was no faster."""
_BYTES_A_THREAD = 8 << 20
"""One thread alone is faster for what lies in the cache: 4 MiB in 0.5 ms, two threads take 0.7."""
_MOST_THREADS = 4
"""Half of the cores at most, and two at least: a thread copies at 6 to 10 GB/s, two at 9 to 14."""


class ShmTransfer:
    """TransferEngine over mapped segments. Copies of more than 1 MiB, and mapping, run in threads off the loop."""

    kind = "shm"

    def __init__(self, host_id: str, threads: int | None = None, *, sweep_s: float = 1.0) -> None:
        """`threads` copy, of all batches together; by default as many as the cores suggest. Mappings of dead owners
        are looked for at most once in `sweep_s`."""
        self._sweep_s = sweep_s
        self._host_id = host_id
        self._clock = SystemClock()
        self._mapped: dict[str, AttachedSegment] = {}
        self._swept_at = self._clock.now()
        threads = threads or max(2, min(_MOST_THREADS, usable_cpus() // 2))
        self._pool = BlockingPool("kvferry-shm", threads)
        self._populating: list[threading.Thread] = []

    def __repr__(self) -> str:
        state = "closed" if self._pool.closed else "open"
        return f"<ShmTransfer {state} host={self._host_id} mapped={len(self._mapped)}>"

    def reaches(self, segment: Segment) -> bool:
        """Whether the segment is on our host and has an `shm` address."""
        return segment.host_id == self._host_id and self.kind in segment.addresses

    def register(self, region: memoryview) -> None:
        """Nothing to do: any local memory can be copied."""

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """As TransferEngine.aclose."""
        await self._pool.aclose()
        while self._mapped:
            self._mapped.popitem()[1].close()
        while self._populating:
            self._populating.pop().join()  # some 10 ms at most

    async def _transfer(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        batch = _CopyBatch(direction, ops)
        try:
            deadline = BatchDeadline(timeout_s)
            deadline.remaining()
            if self._pool.closed:
                raise PeerUnreachableError("the transport is closed")
            self._sweep()
            if batch.open.keys() <= self._mapped.keys():
                self._find_memory(batch)
            else:
                await self._pool.run(lambda: self._find_memory(batch), batch.stop, deadline)
            if batch.num_bytes <= _INLINE_BYTES:
                batch.copy_pieces()
            else:
                await self._copy_in_threads(batch, deadline)
            if batch.stopped:
                raise PeerUnreachableError("the transport was closed during the copy")
            self._check_owners(batch)
        except TransferError as error:
            batch.fail_rest(error)
        return batch.results

    def _find_memory(self, batch: "_CopyBatch") -> None:
        """Plan the batch's copies; ops on segments that cannot be mapped get their error. May map: then call it in a
        thread."""
        for segment_id, indices in list(batch.open.items()):
            try:
                attached = self._attached(batch.ops[indices[0]].segment, check_owner=batch.direction == "read")
            except TransferError as error:
                batch.settle(segment_id, error)
            else:
                batch.plan(indices, attached.view)

    async def _copy_in_threads(self, batch: "_CopyBatch", deadline: BatchDeadline) -> None:
        """Use all threads that are free; all but the first stop early when other batches wait for a thread."""
        threads = min(self._pool.idle, len(batch.pieces), max(1, batch.num_bytes // _BYTES_A_THREAD))
        copies: list[Callable[[], None]] = [batch.copy_pieces]
        copies += [lambda: batch.copy_pieces(lambda: self._pool.crowded)] * (threads - 1)
        runs = [self._pool.run(one, batch.stop, deadline) for one in copies]
        for failed in await asyncio.gather(*runs, return_exceptions=True):
            if failed is not None:
                raise failed

    def _check_owners(self, batch: "_CopyBatch") -> None:
        """Give the copied ops their results. A write is checked afterwards: that says more than a check before it."""
        for segment_id in list(batch.open):
            gone = None
            if batch.direction == "write" and not ((found := self._mapped.get(segment_id)) and found.alive):
                self._mapped.pop(segment_id, None)
                gone = PeerUnreachableError(f"segment {segment_id}: its owner went away")
            batch.settle(segment_id, gone)

    def _attached(self, segment: Segment, *, check_owner: bool) -> AttachedSegment:
        """The mapping, made if need be; with `check_owner` also made anew if the owner holds the segment no longer."""
        found = self._mapped.get(segment.id)
        if found is not None and not (check_owner and not found.alive):
            return found
        self._mapped.pop(segment.id, None)
        fresh = attach(segment)  # raises what is wrong, if its owner is gone
        self._mapped[segment.id] = fresh
        if fresh.unpopulated_bytes:
            thread = threading.Thread(target=fresh.populate_rest, name="kvferry-populate", daemon=True)
            self._populating.append(thread)
            thread.start()
        return fresh

    def _sweep(self) -> None:
        """Drop the mappings of dead owners' segments: memory is freed with its last mapping.

        Mappings are dropped, not closed: a thread may be copying from one, and it goes when that thread is done.
        """
        now = self._clock.now()
        if now - self._swept_at < self._sweep_s:
            return
        self._swept_at = now
        self._populating = [thread for thread in self._populating if thread.is_alive()]
        for segment_id, attached in list(self._mapped.items()):
            if not attached.alive:
                self._mapped.pop(segment_id, None)


_Show = Callable[[memoryview], None] | None


class _Piece(NamedTuple):
    """Bytes that one thread copies: local buffers, and their place in the segment. `show`: as TransferOp.on_part."""

    local: tuple[memoryview, ...]
    remote: memoryview
    show: _Show


class _CopyBatch:
    """Ops of one call and their results so far. `open`: the ops that have none yet, by segment."""

    __slots__ = ("_bounces", "_copy", "direction", "num_bytes", "open", "ops", "pieces", "results", "stopped")

    def __init__(self, direction: Direction, ops: Sequence[TransferOp]) -> None:
        self.direction = direction
        self.ops = ops
        self.results = check_batch(direction, ops)
        self.num_bytes = 0
        self.open: dict[str, list[int]] = {}
        self.pieces: deque[_Piece] = deque()
        """Still to be copied: threads take them from the left."""
        self.stopped = False
        self._bounces: list[memoryview] = []
        """Free ones of `_copy_gathered`: of as many threads as have copied."""
        for index, op in enumerate(ops):
            if self.results[index] is None and (num_bytes := op.num_bytes):
                self.num_bytes += num_bytes
                self.open.setdefault(op.segment.id, []).append(index)
        self._copy = _copy_for(direction, self.num_bytes)

    def stop(self) -> None:
        """End the copying soon. From any thread."""
        self.stopped = True

    def settle(self, segment_id: str, error: TransferError | None) -> None:
        """Give the segment's ops that have no error of their own this result."""
        for index in self.open.pop(segment_id):
            self.results[index] = self.results[index] or error

    def fail_rest(self, error: TransferError) -> None:
        """Give `error` to all that are open."""
        for segment_id in list(self.open):
            self.settle(segment_id, error)

    def plan(self, indices: Sequence[int], memory: memoryview) -> None:
        """Cut these ops, all on one segment, into pieces: slices of an op, or a whole op where its bytes are shown in
        order."""
        for index in indices:
            op = self.ops[index]
            if op.segment.size_bytes != memory.nbytes and (outside := range_error(op, memory.nbytes)):
                self.results[index] = outside
                continue
            if op.on_part is not None:
                whole = memory[op.offset : op.offset + op.num_bytes]
                self.pieces.append(_Piece(tuple(byte_views(op)), whole, op.on_part))
                continue
            at = op.offset
            for view in byte_views(op):
                for start in range(0, view.nbytes, _SLICE_BYTES):
                    part = view[start : start + _SLICE_BYTES]
                    self.pieces.append(_Piece((part,), memory[at : at + part.nbytes], None))
                    at += part.nbytes

    def copy_pieces(self, leave: Callable[[], bool] | None = None) -> None:
        """Copy pieces until none is left, `leave` says so, or the batch is stopped. Any number of threads may."""
        while self.pieces and not (leave and leave()):
            try:
                piece = self.pieces.popleft()
            except IndexError:  # another thread was faster
                return
            if not self._copy_piece(piece):
                return

    def _copy_piece(self, piece: _Piece) -> bool:
        """Whether all of it was copied. What is shown is cut as it is copied; small neighbours are copied as one."""
        at = 0
        for group in groups(piece.local, _SLICE_BYTES if piece.show is None else _SHOWN_BYTES):
            if self.stopped:
                return False
            num_bytes = sum(view.nbytes for view in group)
            remote = piece.remote[at : at + num_bytes]
            at += num_bytes
            if len(group) >= _GATHERED_VIEWS and self._copy is not copy_holding_lock:
                self._copy_gathered(group, remote, piece.show)
            else:
                self._copy_each(group, remote, piece.show)
        return True

    def _copy_each(self, views: list[memoryview], remote: memoryview, show: _Show) -> None:
        at = 0
        for view in views:
            part = remote[at : at + view.nbytes]
            self._copy(*((part, view) if self.direction == "write" else (view, part)))
            at += view.nbytes
            if show is not None:
                show(view)

    def _copy_gathered(self, views: list[memoryview], remote: memoryview, show: _Show) -> None:
        """By way of memory of our own, which stays in the cache: one long copy and one part that is shown, which let go
        of the interpreter's lock, and short copies that keep it."""
        try:
            whole = self._bounces.pop()
        except IndexError:
            whole = memoryview(bytearray(_SHOWN_BYTES))
        bounce, at = whole[: remote.nbytes], 0
        if self.direction == "read":
            self._copy(bounce, remote)
            if show is not None:
                show(bounce)
        for view in views:
            part = bounce[at : at + view.nbytes]
            if self.direction == "read":
                view[:] = part
            else:
                part[:] = view
            at += view.nbytes
        if self.direction == "write":
            self._copy(remote, bounce)
            if show is not None:
                show(bounce)
        self._bounces.append(whole)


def _copy_for(direction: Direction, num_bytes: int) -> Copy:
    """Which copy to use: a large write goes past the cache, for it would leave it before anybody reads it; what was
    read is used at once."""
    if num_bytes <= _INLINE_BYTES:
        return copy_holding_lock
    if direction == "write" and num_bytes > streams_above_bytes():
        return streaming_copy() or copy
    return copy
