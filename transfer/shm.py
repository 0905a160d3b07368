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

_INLINE_BYTES = 256 << 10
"""Up to here a copy (6 to 25 us) is cheaper than the hop to a thread and back (60 to 100 us)."""
_SLICE_BYTES = 4 << 20
"""A large copy looks at its stop flag this often: about 0.5 ms; slower in smaller slices, not faster in larger ones."""
_SHOWN_BYTES = 1 << 20
"""Slices of a copy whose reader looks at each at once. 64 MiB with a checksum: 5.9 ms; 6.9 in slices of 4 MiB, which
have left the cache, and 7.5 with the checksum after the copy."""
_SWEEP_S = 1.0


class ShmTransfer:
    """TransferEngine over mapped segments. Copies of more than 256 KiB, and mapping, run in threads off the loop."""

    kind = "shm"

    def __init__(self, host_id: str, threads: int = 2) -> None:
        self._host_id = host_id
        self._clock = SystemClock()
        self._mapped: dict[str, AttachedSegment] = {}
        self._swept_at = self._clock.now()
        self._pool = BlockingPool("kvferry-shm", threads)

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
            if batch.num_bytes <= _INLINE_BYTES and all(op.segment.id in self._mapped for op in ops):
                self._copy(batch)
            else:
                await self._pool.run(lambda: self._copy(batch), batch.stop.set, deadline)
        except TransferError as error:
            batch.fail_rest(error)
        return batch.results

    def _copy(self, batch: "_Batch") -> None:
        """Runs in a thread or, when small, on the loop. Errors are an op's own; stops early when told to."""
        for segment_id, indices in batch.by_segment.items():
            segment = batch.ops[indices[0]].segment
            try:
                attached = self._attached(segment)
                for index in indices:
                    batch.copy_one(index, attached.view)
                if batch.direction == "write" and not attached.alive:
                    raise PeerUnreachableError(f"segment {segment_id}: its owner went away during the write")
            except TransferError as error:
                batch.settle(indices, error)
            else:
                batch.settle(indices, None)

    def _attached(self, segment: Segment) -> AttachedSegment:
        found = self._mapped.get(segment.id)
        if found is not None and found.alive:
            return found
        self._mapped.pop(segment.id, None)
        fresh = attach(segment)  # says what is wrong with it, if its owner is gone
        self._mapped[segment.id] = fresh
        return fresh

    def _sweep(self) -> None:
        """Let go of dead owners' segments: their memory is freed with the last mapping of it.

        Mappings are dropped, not closed: a thread may be copying from one, and it goes when that thread is done.
        """
        now = self._clock.now()
        if now - self._swept_at < _SWEEP_S:
            return
        self._swept_at = now
        for segment_id, attached in list(self._mapped.items()):
            if not attached.alive:
                self._mapped.pop(segment_id, None)


class _Batch:
    """Ops of one call, their results so far, and the flag that ends its copying."""

    def __init__(self, direction: Direction, ops: Sequence[TransferOp]) -> None:
        self.direction = direction
        self.ops = ops
        self.results = check_batch(direction, ops)
        self.num_bytes = 0
        self.by_segment: dict[str, list[int]] = {}
        self.stop = threading.Event()
        self._pending: set[int] = set()
        for index, op in enumerate(ops):
            if self.results[index] is None and op.num_bytes:
                self.num_bytes += op.num_bytes
                self.by_segment.setdefault(op.segment.id, []).append(index)
                self._pending.add(index)

    def settle(self, indices: Sequence[int], error: TransferError | None) -> None:
        """Give all of `indices` that have no error of their own this result."""
        for index in indices:
            self.results[index] = self.results[index] or error
            self._pending.discard(index)

    def fail_rest(self, error: TransferError) -> None:
        """Give `error` to all that are not settled."""
        self.settle(sorted(self._pending), error)

    def copy_one(self, index: int, memory: memoryview) -> None:
        """Move one op's bytes. Raises PeerUnreachableError when the batch was stopped (its caller knows why)."""
        op = self.ops[index]
        if outside := range_error(op, memory.nbytes):
            self.results[index] = outside
            return
        at = op.offset
        show = op.on_part if self.direction == "read" else None
        slice_bytes = _SLICE_BYTES if show is None else _SHOWN_BYTES
        for view in byte_views(op):
            for start in range(0, view.nbytes, slice_bytes):
                part = view[start : start + slice_bytes]
                self._copy_part(part, memory[at : at + part.nbytes])
                at += part.nbytes
                if show is not None:
                    show(part)

    def _copy_part(self, local: memoryview, remote: memoryview) -> None:
        source, target = (local, remote) if self.direction == "write" else (remote, local)
        if self.stop.is_set():
            raise PeerUnreachableError("the transport was closed during the copy")
        if local.nbytes <= _INLINE_BYTES:
            target[:] = source
        else:  # numpy lets go of the interpreter lock, memoryview does not
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
