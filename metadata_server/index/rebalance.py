"""One run that evens out how full the segments are: which of them shed chunks, how many bytes yet, who may take them.

Owns the run; soft state: it ends with the server. Which chunk goes where is `moving`'s. Invariants: a run grants no
more bytes than it was begun with; a segment sheds down to the share of its room that was in use in the cluster as the
run began, and none that has its share takes more. Pure.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvcore.extents import aligned
from metadata_server.cache_messages import RebalanceReply, SegmentFill
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.limits import IndexLimits
from metadata_server.index.nodes import LiveNode, NodeRegistry


@dataclass(frozen=True, slots=True)
class _Share:
    """Of the cluster's room that is in use."""

    used: int
    of: int

    def in_bytes(self, record: SegmentRecord) -> int:
        """Of one segment."""
        return self.used * record.allocator.capacity // (self.of or 1)

    def surplus(self, record: SegmentRecord) -> int:
        """How much more one segment has."""
        return 0 if record.rebuilding else max(0, record.allocator.used - self.in_bytes(record))

    def exceeded(self, record: SegmentRecord, by: float) -> bool:
        """Whether one segment has more by this share of its room."""
        return self.surplus(record) > by * record.allocator.capacity


@dataclass(slots=True)
class _Run:
    number: int
    most_bytes: int
    last_at: float
    share: "_Share"
    sheds: set[SegmentRecord] = field(default_factory=set)
    granted_bytes: int = 0
    moved_bytes: int = 0
    moved_chunks: int = 0
    end: str = ""
    """Why it is over; empty: it is not."""


class Rebalance:
    """Mutated by ChunkMoves only, which lets run out what is due before each call."""

    def __init__(self, nodes: NodeRegistry, limits: IndexLimits) -> None:
        self._nodes, self._limits = nodes, limits
        self._run = _Run(0, 0, 0.0, _Share(0, 0), end="none was begun")

    def __repr__(self) -> str:
        run = self._run
        return f"<Rebalance {run.number}: {run.moved_chunks} moved, {run.end or f'{len(run.sheds)} segments shed'}>"

    # --- the run -----------------------------------------------------------------------------------------------------

    def begin(self, most_bytes: int, now: float) -> None:
        """A new one; the one before is over. `most_bytes` 0: as many as it takes."""
        share = self._share()
        sheds = {record for record in self._open() if share.exceeded(record, self._limits.even_within)}
        bound = sum(map(share.surplus, sheds))
        bound = min(bound, most_bytes) if most_bytes else bound
        self._run = _Run(self._run.number + 1, bound, now, share, sheds)
        self._end_if_done()

    def stop(self) -> None:
        """The run is over, if there is one. What is being copied may still come."""
        self._run.end = self._run.end or "it was stopped"

    def report(self, now: float) -> RebalanceReply:
        """How it goes, and how full the segments are."""
        self._look(now)
        run, share = self._run, self._share()
        over = [record for record in self._open() if share.exceeded(record, self._limits.even_within)]
        return RebalanceReply(
            number=run.number,
            running=not run.end,
            end=run.end,
            most_bytes=run.most_bytes,
            moved_bytes=run.moved_bytes,
            moved_chunks=run.moved_chunks,
            share=share.used / (share.of or 1),
            to_move_bytes=sum(map(share.surplus, over)),
            segments=[
                SegmentFill(
                    segment_id=record.segment.id,
                    node_id=record.segment.node_id,
                    used_bytes=record.allocator.used,
                    size_bytes=record.allocator.capacity,
                    sheds=not run.end and record in run.sheds,
                )
                for record in self._open()
            ],
        )

    # --- what moves --------------------------------------------------------------------------------------------------

    def wants(self, node: LiveNode | None, now: float) -> bool:
        """Whether the node is to move chunks."""
        if node is None or self._run.end:
            return False
        self._look(now)
        return not self._run.end and any(record in self._run.sheds for record in node.segments.values())

    def shedding(self, node: LiveNode) -> list[SegmentRecord]:
        """The node's segments that are to shed."""
        return [record for record in node.segments.values() if record in self._run.sheds]

    def may_leave(self, record: SegmentRecord, length: int, leaving: int) -> bool:
        """Whether a chunk may leave the segment, which `leaving` bytes will leave already. False once: it is done."""
        run, room = self._run, aligned(length)
        if run.granted_bytes + room > run.most_bytes:
            run.end = run.end or "all was moved that was to be"
        elif run.share.surplus(record) - leaving < room:
            self.done(record)
        else:
            return True
        return False

    def may_take(self, record: SegmentRecord) -> bool:
        """Whether a segment has less than its share."""
        return not record.rebuilding and record.allocator.used < self._run.share.in_bytes(record)

    def granted(self, length: int, now: float) -> None:
        """A copy is to be made."""
        self._run.granted_bytes += aligned(length)
        self._run.last_at = now

    def given_up(self, length: int) -> None:
        """A chunk has left the segment that it was copied from."""
        self._run.moved_bytes += aligned(length)
        self._run.moved_chunks += 1

    def done(self, record: SegmentRecord) -> None:
        """It sheds no more: it is even, or nobody may take what it has."""
        self._run.sheds.discard(record)
        self._end_if_done()

    def _look(self, now: float) -> None:
        run = self._run
        if not run.end:
            run.sheds &= set(self._open())  # their nodes died, or were drained
            self._end_if_done()
        if not run.end and now - run.last_at > self._limits.rebalance_idle_s:
            run.end = f"nothing was moved for {self._limits.rebalance_idle_s:.0f} s"

    def _end_if_done(self) -> None:
        if not self._run.sheds:
            self._run.end = self._run.end or "no segment can shed more"

    def _open(self) -> Iterator[SegmentRecord]:
        closed = self._nodes.closed_segments()
        return (record for name, record in self._nodes.segments.items() if name not in closed)

    def _share(self) -> _Share:
        told = [record.allocator for record in self._open() if not record.rebuilding]
        return _Share(sum(one.used for one in told), sum(one.capacity for one in told))
