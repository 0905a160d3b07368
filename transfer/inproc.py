"""Transport between objects of one process, for tests and the simulation: no threads, no sockets, deterministic.

Owns nothing; the registry of segments is its maker's. A hook injects faults, so that the real store code meets loss,
delay and torn writes under virtual time.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass

from kvcore.errors import PeerUnreachableError, SegmentUnknownError, TransferError, TransferTimeoutError
from kvcore.types import Segment
from transfer.base import Direction, TransferOp
from transfer.ranges import byte_views, check_batch, range_error

SegmentRegistry = MutableMapping[str, memoryview]
"""Segment id -> its memory. Removing an entry is the death of its owner."""


@dataclass(frozen=True, slots=True)
class InprocFault:
    """How one op fails: its first `copied_bytes` bytes move, then `error` is its result."""

    error: TransferError
    copied_bytes: int = 0


FaultHook = Callable[[Direction, TransferOp], Awaitable[InprocFault | None]]
"""Called before each op. It may sleep (delay, within the batch's deadline), and decides whether the op fails."""


class InprocTransfer:
    """TransferEngine over a registry. Without a fault hook a call finishes without giving up the loop."""

    kind = "inproc"

    def __init__(self, segments: SegmentRegistry, fault: FaultHook | None = None) -> None:
        self._segments = segments
        self._fault = fault
        self._closed = False

    def __repr__(self) -> str:
        return f"<InprocTransfer {'closed' if self._closed else 'open'} segments={len(self._segments)}>"

    def reaches(self, segment: Segment) -> bool:
        """Whether the segment has an `inproc` address (its text does not matter)."""
        return self.kind in segment.addresses

    def register(self, region: memoryview) -> None:
        """Nothing to do."""

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """Later ops are refused."""
        self._closed = True

    async def _transfer(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        results = check_batch(direction, ops)
        done = 0
        try:
            async with asyncio.timeout(timeout_s):
                for done, op in enumerate(ops):
                    if results[done] is None and op.num_bytes:
                        results[done] = await self._transfer_one(direction, op)
        except TimeoutError:
            late = TransferTimeoutError(f"{direction} of {len(ops)} ops was not done after {timeout_s} s")
            return [*results[:done], *(error or late for error in results[done:])]
        return results

    async def _transfer_one(self, direction: Direction, op: TransferOp) -> TransferError | None:
        fault = None if self._fault is None else await self._fault(direction, op)
        memory = self._segments.get(op.segment.id)
        if self._closed:
            return PeerUnreachableError("the transport is closed")
        if memory is None:
            return SegmentUnknownError(f"segment {op.segment.id} is not (any longer) here")
        if outside := range_error(op, memory.nbytes):
            return outside
        _copy(direction, op, memory, op.num_bytes if fault is None else fault.copied_bytes)
        return None if fault is None else fault.error


def _copy(direction: Direction, op: TransferOp, memory: memoryview, num_bytes: int) -> None:
    at, end = op.offset, op.offset + num_bytes
    for view in byte_views(op):
        length = min(view.nbytes, end - at)
        if direction == "write":
            memory[at : at + length] = view[:length]
        else:
            view[:length] = memory[at : at + length]
        if op.on_part is not None:
            op.on_part(view[:length])
        at += length
