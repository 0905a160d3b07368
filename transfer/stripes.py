"""How a batch is laid out over connections and frames. Pure."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from transfer.base import TransferOp
from transfer.ranges import byte_views


class OpSlice(NamedTuple):
    """A contiguous piece of one op: all of it, or a slice where an op was cut between two connections."""

    op_index: int
    offset: int
    views: list[memoryview]
    num_bytes: int
    show: Callable[[memoryview], None] | None = None
    """The op's `on_part`, where this is all of it: slices on several connections arrive in no order."""


def stripe(ops: Sequence[tuple[int, TransferOp]], max_stripes: int, min_bytes: int) -> list[list[OpSlice]]:
    """Cut `(index, op)` pairs into at most `max_stripes` lists of about equal bytes, none far below `min_bytes`.

    No op is empty. The slices cover each op exactly once, in order. Each list but the last has `share` bytes, so an op
    is in one of three cases:
    1. it fits into what the current list has room for: one slice, all of it;
    2. it is longer: a slice fills the current list, and the rest goes on in the next, or in several;
    3. the current list was filled exactly by what came before: it begins the next list, then as case 1 or 2.
    Only in case 1 are its bytes shown: slices on several connections arrive in no order.
    """
    total = sum(op.num_bytes for _, op in ops)
    count = max(1, min(max_stripes, total // min_bytes))
    if count == 1:
        return [[OpSlice(index, op.offset, byte_views(op), op.num_bytes, op.on_part) for index, op in ops]]
    share = -(-total // count)
    stripes: list[list[OpSlice]] = [[]]
    room = share
    for index, op in ops:
        offset, views, rest = op.offset, byte_views(op), op.num_bytes
        while rest:
            if room == 0:  # case 3, or the rest of case 2
                stripes.append([])
                room = share
            length = min(rest, room)
            taken, views = _take(views, length)
            show = op.on_part if length == op.num_bytes else None  # case 1
            stripes[-1].append(OpSlice(index, offset, taken, length, show))
            offset, rest, room = offset + length, rest - length, room - length
    return stripes


def shown_groups(parts: Sequence[OpSlice], max_bytes: int) -> Iterator[list[tuple[memoryview, OpSlice]]]:
    """The parts' views cut into groups of `max_bytes` (the last is smaller), in order, each view beside its part."""
    group: list[tuple[memoryview, OpSlice]] = []
    room = max_bytes
    for part in parts:
        for view in part.views:
            start = 0
            while start < view.nbytes:
                piece = view[start : start + room]
                group.append((piece, part))
                start, room = start + piece.nbytes, room - piece.nbytes
                if not room:
                    yield group
                    group, room = [], max_bytes
    if group:
        yield group


def groups(views: Sequence[memoryview], max_bytes: int) -> Iterator[list[memoryview]]:
    """The views cut into groups of `max_bytes` (the last is smaller), in order."""
    whole = [OpSlice(0, 0, list(views), sum(view.nbytes for view in views))]
    return ([view for view, _ in group] for group in shown_groups(whole, max_bytes))


def _take(views: list[memoryview], num_bytes: int) -> tuple[list[memoryview], list[memoryview]]:
    """Split a list of views at a byte."""
    for position, view in enumerate(views):
        if view.nbytes > num_bytes:
            head = [*views[:position], view[:num_bytes]] if num_bytes else views[:position]
            return head, [view[num_bytes:], *views[position + 1 :]]
        num_bytes -= view.nbytes
    return views, []
