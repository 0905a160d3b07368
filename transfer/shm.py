"""Shared memory: segments of processes on the same host, mapped once and then copied to and from directly.

Owns the mappings. Before each batch (and after each write) the owner is seen to still hold the segment, so a write to a
dead owner's memory is an error; one that dies later is the reader's concern, as with every transport.
"""

import threading
from collections.abc import Sequence

import numpy as np

from kvcore.clock import SystemClock
from kvcore.errors import PeerUnreachableError, TransferError
from kvcore.types import Segment
from transfer.base import Direction, TransferOp
from transfer.blocking import BlockingPool, Deadline
from transfer.memory import AttachedSegment, attach
from transfer.ranges import byte_views, check_batch, range_error

_INLINE_BYTES = 1 << 20
"""Up to here a copy (30 us from the cache, 90 from memory) takes less than the hop to a thread and back (110 us)."""
_SLICE_BYTES = 4 << 20
"""A large copy looks at its stop flag this often: about 0.5 ms; slower in smaller slices, not faster in larger ones."""
_SHOWN_BYTES = 1 << 20
"""Slices of a copy whose caller looks at each at once. 64 MiB with a checksum: 5.9 ms; 6.9 in slices of 4 MiB, which
have left the cache, and 7.5 with the checksum after the copy."""
_SWEEP_S = 1.0


class ShmTransfer:
    """TransferEngine over mapped segments. Copies of more than 1 MiB, and mapping, run in threads off the loop."""

    kind = "shm"

    def __init__(self, host_id: str, threads: int = 2) -> None:
        self._host_id = host_id
        self._clock = SystemClock()
        self._mapped: dict[str, AttachedSegment] = {}
        self._swept_at = self._clock.now()
        self._pool = BlockingPool("kvferry-shm", threads)
        self._populating: list[threading.Thread] = []

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
        batch = _Batch(direction, ops)
        try:
            deadline = Deadline(timeout_s)
            deadline.remaining()
            if self._pool.closed:
                raise PeerUnreachableError("the transport is closed")
            self._sweep()
            if batch.num_bytes <= _INLINE_BYTES and batch.open.keys() <= self._mapped.keys():
                self._copy(batch)
            else:
                await self._pool.run(lambda: self._copy(batch), batch.stop, deadline)
                batch.fail_rest(PeerUnreachableError("the transport was closed during the copy"))
        except TransferError as error:
            batch.fail_rest(error)
        return batch.results

    def _copy(self, batch: "_Batch") -> None:
        """Runs in a thread or, when small, on the loop. Errors are an op's own; leaves ops open when told to stop."""
        for segment_id, indices in list(batch.open.items()):
            try:
                attached = self._attached(batch.ops[indices[0]].segment, look=batch.direction == "read")
                for index in indices:
                    if not batch.copy_one(index, attached.view):
                        return
                if batch.direction == "write" and not attached.alive:  # looking once, afterwards, tells more
                    self._mapped.pop(segment_id, None)
                    raise PeerUnreachableError(f"segment {segment_id}: its owner went away")
            except TransferError as error:
                batch.settle(segment_id, error)
            else:
                batch.settle(segment_id, None)

    def _attached(self, segment: Segment, *, look: bool) -> AttachedSegment:
        """The mapping; `look`: made anew unless the owner is seen to hold the segment still."""
        found = self._mapped.get(segment.id)
        if found is not None and not (look and not found.alive):
            return found
        self._mapped.pop(segment.id, None)
        fresh = attach(segment)  # says what is wrong with it, if its owner is gone
        self._mapped[segment.id] = fresh
        if fresh.unpopulated_bytes:
            thread = threading.Thread(target=fresh.populate_rest, name="kvferry-populate", daemon=True)
            self._populating.append(thread)
            thread.start()
        return fresh

    def _sweep(self) -> None:
        """Let go of dead owners' segments: their memory is freed with the last mapping of it.

        Mappings are dropped, not closed: a thread may be copying from one, and it goes when that thread is done.
        """
        now = self._clock.now()
        if now - self._swept_at < _SWEEP_S:
            return
        self._swept_at = now
        self._populating = [thread for thread in self._populating if thread.is_alive()]
        for segment_id, attached in list(self._mapped.items()):
            if not attached.alive:
                self._mapped.pop(segment_id, None)


class _Batch:
    """Ops of one call and their results so far. `open`: the ops that have none yet, by segment."""

    __slots__ = ("_stopped", "direction", "num_bytes", "open", "ops", "results")

    def __init__(self, direction: Direction, ops: Sequence[TransferOp]) -> None:
        self.direction = direction
        self.ops = ops
        self.results = check_batch(direction, ops)
        self.num_bytes = 0
        self.open: dict[str, list[int]] = {}
        self._stopped = False
        for index, op in enumerate(ops):
            if self.results[index] is None and (num_bytes := op.num_bytes):
                self.num_bytes += num_bytes
                self.open.setdefault(op.segment.id, []).append(index)

    def stop(self) -> None:
        """End the copying soon. From any thread."""
        self._stopped = True

    def settle(self, segment_id: str, error: TransferError | None) -> None:
        """Give the segment's ops that have no error of their own this result."""
        for index in self.open.pop(segment_id):
            self.results[index] = self.results[index] or error

    def fail_rest(self, error: TransferError) -> None:
        """Give `error` to all that are open."""
        for segment_id in list(self.open):
            self.settle(segment_id, error)

    def copy_one(self, index: int, memory: memoryview) -> bool:
        """Move one op's bytes; False if the batch was stopped before it was whole."""
        op = self.ops[index]
        if op.segment.size_bytes != memory.nbytes and (outside := range_error(op, memory.nbytes)):
            self.results[index] = outside
            return True
        at = op.offset
        writing = self.direction == "write"
        copy = _copy_holding_lock if self.num_bytes <= _INLINE_BYTES else _copy_bytes
        show = op.on_part
        slice_bytes = _SLICE_BYTES if show is None else _SHOWN_BYTES
        for view in byte_views(op):
            for start in range(0, view.nbytes, slice_bytes):
                if self._stopped:
                    return False
                part = view[start : start + slice_bytes]
                remote = memory[at : at + part.nbytes]
                copy(*((remote, part) if writing else (part, remote)))
                at += part.nbytes
                if show is not None:
                    show(part)
        return True


def _copy_holding_lock(target: memoryview, source: memoryview) -> None:
    """For a copy on the loop: getting the interpreter's lock back can take longer than the copy."""
    target[:] = source


def _copy_bytes(target: memoryview, source: memoryview) -> None:
    """numpy lets go of the interpreter's lock, memoryview does not."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
