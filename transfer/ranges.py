"""What a batch may touch, decided before any byte moves. Pure."""

from collections.abc import Sequence

from kvcore.errors import SegmentUnknownError, TransferError
from transfer.base import Direction, TransferOp


def range_error(op: TransferOp, size_bytes: int) -> TransferError | None:
    """Why the op's range does not lie inside of a segment of `size_bytes`."""
    end = op.offset + op.num_bytes
    if op.offset >= 0 and end <= size_bytes:
        return None
    return SegmentUnknownError(f"segment {op.segment.id}: range [{op.offset}, {end}) is outside of [0, {size_bytes})")


def check_batch(direction: Direction, ops: Sequence[TransferOp]) -> list[TransferError | None]:
    """One result an op: an error for those out of range. ValueError for buffers that break TransferOp's rules."""
    for op in ops:
        for view in op.buffers:
            if not view.c_contiguous or (direction == "read" and view.readonly):
                raise ValueError("buffers are C-contiguous, and writable for a read")
    return [range_error(op, op.segment.size_bytes) for op in ops]


def byte_views(op: TransferOp) -> list[memoryview]:
    """The op's buffers that are not empty, as flat views of bytes."""
    return [view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in op.buffers if view.nbytes]
