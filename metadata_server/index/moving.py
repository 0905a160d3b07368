"""Copies of a drained node's chunks in other nodes' segments: which come next, and where there is room. Pure.

Owns nothing: reservations and replicas are the index's. Invariants: a copy evicts nothing, and its tenant gets no more
than its share by it; a replica of a drained node is given up only when another one is complete in a segment that stays,
and nobody reads it.
"""

import heapq
from collections.abc import Callable, Iterator
from itertools import islice

from kvcore.extents import aligned
from kvcore.types import ChunkKey
from metadata_server.cache_messages import ChunkMove, MoveChunksReply, MoveChunksRequest
from metadata_server.index.chunks.placement import Place
from metadata_server.index.chunks.replicas import ReplicaIndex
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.limits import IndexLimits
from metadata_server.index.nodes import LiveNode, NodeRegistry
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

    def next(self, request: MoveChunksRequest, now: float) -> MoveChunksReply:
        """See MoveChunksRequest."""
        self._tick(now)
        node = self._nodes.get(request.node_id, request.incarnation)
        if node is None or node.info.id not in self._nodes.orders.drained:
            return MoveChunksReply(moves=[], segments=[], left=0)
        self._give_up(node, request.copied)
        index, table = self._index, self._index.table
        alone = list(self._alone(node))
        wanted = heapq.nlargest(self._limits.max_moves, alone, key=table.last_uses.__getitem__)
        moves: list[tuple[int, int]] = []
        left_bytes = request.most_bytes
        with self._reservations.granting(node, now, request.ttl_s) as grant:
            for row in wanted:
                left_bytes -= table.lengths[row]
                if left_bytes < 0 and moves:
                    break
                place = self._room(row)
                if place is None:
                    continue  # a shorter one may fit
                parent = table.parents[row]
                (copy,) = index.reserve(
                    [table.keys[row]],
                    table.lengths[row],
                    place,
                    grant,
                    parent=table.keys[parent] if parent >= 0 else None,
                    in_order=False,
                )
                if (owner := index.record(row).owner(row)) is not None:
                    index.own([copy], owner)
                moves.append((row, copy))
        index.publish()
        sources, copies = index.refs([row for row, _ in moves]), index.refs([copy for _, copy in moves])
        return MoveChunksReply(
            moves=[ChunkMove(source=a, target=b) for a, b in zip(sources, copies, strict=True)],
            segments=index.segments_of([copy for _, copy in moves]),
            left=len(alone),
        )

    def _alone(self, node: LiveNode) -> Iterator[int]:
        """The node's complete replicas whose chunks lie, or are being written, in no segment that stays."""
        index, table = self._index, self._index.table
        closed = {self._nodes.segments[name].number for name in self._nodes.closed_segments()}
        for record in node.segments.values():
            for row in record.complete():
                key = table.keys[row]
                if closed.issuperset(
                    table.segments[other] for other in (*index.rows(key), *index.writing.get(key, ()))
                ):
                    yield row

    def _room(self, row: int) -> Place | None:
        """Free room for a copy, in the emptiest segment that stays and has none."""
        index, closed = self._index, self._nodes.closed_segments()
        key, length, owner = index.table.keys[row], index.table.lengths[row], index.record(row).owner(row)

        def unfit(one: SegmentRecord) -> bool:
            return one.segment.id in closed or index.row_in(key, one.number) is not None or one.is_over(owner, length)

        record = index.rooms.emptiest(aligned(length), unfit)
        offsets = record.allocate(length, owner=owner) if record is not None else []
        return Place(record, offsets) if record is not None and offsets else None

    def _give_up(self, node: LiveNode, keys: list[ChunkKey]) -> None:
        index, table = self._index, self._index.table
        own = {record.number for record in node.segments.values()}
        closed = {self._nodes.segments[name].number for name in self._nodes.closed_segments()}
        for key in dict.fromkeys(islice(keys, self._limits.max_moves)):
            rows = index.rows(key)
            if closed.issuperset(table.segments[row] for row in rows):
                continue
            for row in rows:
                if table.segments[row] in own and row not in table.pins:
                    index.remove(row)
        index.publish()
