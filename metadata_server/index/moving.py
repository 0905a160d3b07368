"""Copies of a node's chunks in other nodes' segments: which come next, and where there is room. Pure.

For nodes that are drained to be emptied, and for those whose segments shed (`rebalance`). Owns nothing but how far it
has looked: reservations and replicas are the index's. Invariants: a copy evicts nothing; a replica is given up only
when another one is complete in a segment that stays, and nobody reads it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from kvcore.extents import aligned
from kvcore.types import ChunkKey
from metadata_server.cache_messages import (
    ChunkMove,
    MoveChunksReply,
    MoveChunksRequest,
    RebalanceReply,
    RebalanceRequest,
)
from metadata_server.index.chunks.latest import Grant
from metadata_server.index.chunks.placement import Place
from metadata_server.index.chunks.replicas import ReplicaIndex
from metadata_server.index.chunks.rows import ReplicaState
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.limits import IndexLimits
from metadata_server.index.move_passes import MovePass, MovePasses
from metadata_server.index.nodes import LiveNode, NodeRegistry
from metadata_server.index.rebalance import Rebalance
from metadata_server.index.reservations import Reservations


class ChunkMoves:
    """`tick` lets run out what is due by a time."""

    def __init__(
        self,
        nodes: NodeRegistry,
        index: ReplicaIndex,
        reservations: Reservations,
        tick: Callable[[float], None],
        limits: IndexLimits,
    ) -> None:
        self._nodes, self._index, self._reservations = nodes, index, reservations
        self._tick, self._limits = tick, limits
        self._passes = MovePasses(limits)
        self.rebalance = Rebalance(nodes, limits)

    def order(self, request: RebalanceRequest, now: float) -> RebalanceReply:
        """See RebalanceRequest."""
        self._tick(now)
        if request.action == "start":
            self.rebalance.begin(request.most_bytes, now)
        else:
            self.rebalance.stop()
        return self.rebalance.report(now)

    def look(self, _: object, now: float) -> RebalanceReply:
        """How full segments are, and how evening them out goes."""
        self._tick(now)
        return self.rebalance.report(now)

    def next(self, request: MoveChunksRequest, now: float) -> MoveChunksReply:
        """See MoveChunksRequest."""
        self._tick(now)
        node = self._nodes.get(request.node_id, request.incarnation)
        if node is None:
            return MoveChunksReply(moves=[], segments=[], left=0)
        in_use = self._give_up(node, request.copied)
        if self._nodes.orders.drain_of(node.info.id) == "move":
            kind: _Drain | _Shed = _Drain(self._nodes, self._index)
        elif self.rebalance.wants(node, now):
            kind = _Shed(self._nodes, self._index, self.rebalance, node, in_use)
        else:
            self._passes.drop(node.number)
            return MoveChunksReply(moves=[], segments=[], left=0, in_use=in_use)
        self._passes.keep([one.number for one in self._nodes])
        one = self._passes.of(node.number, kind.why, lambda: _rows_of(kind.records(node)), now)
        self._look_on(one, node, kind)
        if one.is_over and one.granted:  # what was granted may have failed since: only a pass without any says so
            one = self._passes.of(node.number, kind.why, lambda: _rows_of(kind.records(node)), now)
            self._look_on(one, node, kind)
        with self._reservations.granting(node, now, request.ttl_s) as grant:
            moves = self._grant(one, kind, grant, request.most_bytes, now)
        if one.is_over and not one.granted:
            kind.nothing_moves(node)
        self._index.publish()
        sources, copies = self._index.refs([row for row, _ in moves]), self._index.refs([copy for _, copy in moves])
        return MoveChunksReply(
            moves=[ChunkMove(source=a, target=b) for a, b in zip(sources, copies, strict=True)],
            segments=self._index.segments_of([copy for _, copy in moves]),
            left=one.left + len(moves),
            more=not one.is_over,
            in_use=in_use,
        )

    def _look_on(self, one: MovePass, node: LiveNode, kind: "_Drain | _Shed") -> None:
        table, own = self._index.table, {record.number for record in kind.records(node)}

        def is_candidate(row: int) -> bool:
            """Whether it is still a replica that is to move; one of which a copy is being written waits for that."""
            if table.states[row] != ReplicaState.COMPLETE or table.segments[row] not in own:
                return False
            if not kind.is_alone(row):
                return False
            if kind.is_copied_now(row):
                one.stayed += 1
                return False
            return True

        one.fill(is_candidate, table.last_uses, self._limits)

    def _grant(
        self, one: MovePass, kind: "_Drain | _Shed", grant: Grant, most_bytes: int, now: float
    ) -> list[tuple[int, int]]:
        """Rows with the rows of their copies, which are reserved."""
        index, table, moves = self._index, self._index.table, list[tuple[int, int]]()
        left_bytes = most_bytes
        for _ in range(min(self._limits.max_moves, len(one.candidates))):
            row = one.candidates[-1]
            length = table.lengths[row]
            if left_bytes < length and moves:
                break
            one.candidates.pop()
            if table.states[row] != ReplicaState.COMPLETE or not kind.is_alone(row) or kind.is_copied_now(row):
                one.stayed += 1  # since it was looked at; the next pass sees what has become of it
                continue
            place = self._room(row, kind) if kind.may_leave(row) else None
            if place is None:
                one.stayed += 1
                continue  # a shorter one may fit
            left_bytes -= length
            parent = table.parents[row]
            (copy,) = index.reserve(
                [table.keys[row]],
                length,
                place,
                grant,
                parent=table.keys[parent] if parent >= 0 else None,
                in_order=False,
            )
            if (owner := index.record(row).owner(row)) is not None:
                index.own([copy], owner)
            kind.granted(row, now)
            one.granted += 1
            moves.append((row, copy))
        return moves

    def _room(self, row: int, kind: "_Drain | _Shed") -> Place | None:
        """Free room for a copy, in the emptiest segment that may take it and has none."""
        index = self._index
        key, length, owner = index.table.keys[row], index.table.lengths[row], index.record(row).owner(row)

        def unfit(one: SegmentRecord) -> bool:
            there = one.number in kind.closed or index.row_in(key, one.number) is not None
            return there or one.is_over(owner, length) or not kind.may_take(one)

        record = index.rooms.emptiest(aligned(length), unfit)
        offsets = record.allocate(length, owner=owner) if record is not None else []
        return Place(record, offsets) if record is not None and offsets else None

    def _give_up(self, node: LiveNode, keys: list[ChunkKey]) -> list[ChunkKey]:
        """Remove the node's replicas of what lies elsewhere; returns what is being read here."""
        index, table, in_use = self._index, self._index.table, list[ChunkKey]()
        own = {record.number for record in node.segments.values()}
        staying = {record.number for record in self._nodes.segments.values()} - _closed(self._nodes) - own
        for key in dict.fromkeys(islice(keys, self._limits.max_moves)):
            rows = index.rows(key)
            if staying.isdisjoint(table.segments[row] for row in rows):
                continue
            for row in rows:
                if table.segments[row] not in own:
                    continue
                if row in table.pins:
                    in_use.append(key)
                else:
                    self.rebalance.given_up(table.lengths[row])
                    index.remove(row)
        index.publish()
        return in_use


class _Drain:
    """All of a node's chunks that lie in no segment that stays, to wherever there is room."""

    why = "drain"

    def __init__(self, nodes: NodeRegistry, index: ReplicaIndex) -> None:
        self._index = index
        self.closed = _closed(nodes)

    def records(self, node: LiveNode) -> list[SegmentRecord]:
        return list(node.segments.values())

    def is_alone(self, row: int) -> bool:
        table = self._index.table
        return self.closed.issuperset(table.segments[other] for other in self._index.rows(table.keys[row]))

    def is_copied_now(self, row: int) -> bool:
        table = self._index.table
        writing = self._index.writing.get(table.keys[row], ())
        return not self.closed.issuperset(table.segments[other] for other in writing)

    def may_leave(self, row: int) -> bool:
        return True

    def may_take(self, record: SegmentRecord) -> bool:
        return True

    def granted(self, row: int, now: float) -> None:
        pass

    def nothing_moves(self, node: LiveNode) -> None:
        pass


class _Shed:
    """Chunks of a segment that is too full, which lie nowhere else and which nobody reads or has pinned."""

    why = "shed"

    def __init__(
        self, nodes: NodeRegistry, index: ReplicaIndex, rebalance: Rebalance, node: LiveNode, in_use: list[ChunkKey]
    ) -> None:
        self._index, self._rebalance, self.closed = index, rebalance, _closed(nodes)
        self._leaving = Counter[int]()
        own, table = {record.number for record in node.segments.values()}, index.table
        for row in (row for key in in_use for row in index.rows(key)):
            if table.segments[row] in own:
                self._leaving[table.segments[row]] += aligned(table.lengths[row])

    def records(self, node: LiveNode) -> list[SegmentRecord]:
        return self._rebalance.shedding(node)

    def is_alone(self, row: int) -> bool:
        index = self._index
        return row not in index.table.pins and len(index.rows(index.table.keys[row])) == 1

    def is_copied_now(self, row: int) -> bool:
        return bool(self._index.writing.get(self._index.table.keys[row]))

    def may_leave(self, row: int) -> bool:
        table = self._index.table
        return self._rebalance.may_leave(
            self._index.record(row), table.lengths[row], self._leaving[table.segments[row]]
        )

    def may_take(self, record: SegmentRecord) -> bool:
        return self._rebalance.may_take(record)

    def granted(self, row: int, now: float) -> None:
        table = self._index.table
        self._leaving[table.segments[row]] += aligned(table.lengths[row])
        self._rebalance.granted(table.lengths[row], now)

    def nothing_moves(self, node: LiveNode) -> None:
        for record in self.records(node):
            self._rebalance.done(record)


def _closed(nodes: NodeRegistry) -> set[int]:
    return {nodes.segments[name].number for name in nodes.closed_segments()}


def _rows_of(records: list[SegmentRecord]) -> Iterator[int]:
    for record in records:
        yield from record.complete()
