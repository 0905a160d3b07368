"""How a batch is laid out over connections and frames. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from transfer.base import TransferOp
from transfer.ranges import byte_views


@dataclass(frozen=True, slots=True)
class Part:
    """A contiguous piece of one op: all of it, or a slice where an op was cut between two connections."""

    op_index: int
    offset: int
    views: list[memoryview]
    num_bytes: int


def stripe(ops: Sequence[tuple[int, TransferOp]], max_stripes: int, min_bytes: int) -> list[list[Part]]:
    """Cut `(index, op)` pairs into at most `max_stripes` lists of about equal bytes, none far below `min_bytes`.

    No op is empty. The parts cover each op exactly once, in order.
    """
    total = sum(op.num_bytes for _, op in ops)
    count = max(1, min(max_stripes, total // min_bytes))
    share = -(-total // count)
    stripes: list[list[Part]] = [[]]
    room = share
    for index, op in ops:
        offset, views, rest = op.offset, byte_views(op), op.num_bytes
        while rest:
            if room == 0:
                stripes.append([])
                room = share
            taken, views = _take(views, min(rest, room))
            length = min(rest, room)
            stripes[-1].append(Part(index, offset, taken, length))
            offset, rest, room = offset + length, rest - length, room - length
    return stripes


def _take(views: list[memoryview], num_bytes: int) -> tuple[list[memoryview], list[memoryview]]:
    """Split a list of views at a byte."""
    for position, view in enumerate(views):
        if view.nbytes > num_bytes:
            head = [*views[:position], view[:num_bytes]] if num_bytes else views[:position]
            return head, [view[num_bytes:], *views[position + 1 :]]
        num_bytes -= view.nbytes
    return views, []
