"""What is seen of the index from outside: who lives, what is held, and a snapshot as events. Pure; changes nothing."""

from collections import Counter
from collections.abc import Iterator

from kvcore.types import ChunkKey
from metadata_server.account_messages import Stats
from metadata_server.index.chunks.rows import ReplicaState
from metadata_server.index.event_log import MAX_BATCH_KEYS, EventLog
from metadata_server.index.membership import IndexParts
from metadata_server.messages import EventBatch, NodesReply


class IndexReport:
    """Reads the parts of a MetadataState, which lets run out what is due before each call."""

    def __init__(self, parts: IndexParts, log: EventLog, *, counts: Counter[str]) -> None:
        self._log = log
        self._nodes = parts.nodes
        self._index = parts.index
        self._reservations = parts.reservations
        self._reading = parts.reading
        self._imports = parts.imports
        self._holdings = parts.holdings
        self._counts = counts

    def __repr__(self) -> str:
        return f"<IndexReport of {self._index}>"

    @property
    def num_rebuilding(self) -> int:
        """Segments of which not all is told yet."""
        return len(self._imports)

    def nodes(self) -> NodesReply:
        """Live nodes and segments."""
        names = self._nodes.identity
        return NodesReply(
            epoch=self._log.epoch,
            nodes=[node.info for node in self._nodes],
            segments=[record.segment for record in self._nodes.segments.values()],
            cluster=names.cluster,
            model=names.model,
        )

    def stats(self, waiters: int) -> Stats:
        """What is held now. O(nodes + segments)."""
        return Stats(
            epoch=self._log.epoch,
            nodes=[node.info for node in self._nodes],
            segments=[record.stats() for record in self._nodes.segments.values()],
            objects=len(self._index.complete),
            reservations=len(self._reservations),
            read_leases=len(self._reading.leases),
            waiters=waiters,
            counters=dict(self._counts),
            rebuilding=self.num_rebuilding,
        )

    def snapshot(self) -> Iterator[EventBatch]:
        """The whole index as event batches, each made when it is asked for: the state may change between any two.

        With all events from its `next_seq` on it is the index at the time of the last of them, whatever happened while
        it was made: each key of a segment is there as at some time since then, or its last event says whether it is.
        So with what lies on nodes' disks.
        """
        return self._log.snapshot([node.info for node in self._nodes], self._stored(), self._holdings.told())

    def _stored(self) -> Iterator[tuple[str, str, list[ChunkKey]]]:
        """By rows, which stay where they are while the order in segments changes. Rows that are new meanwhile are told
        of by events."""
        table, records = self._index.table, self._index.rooms.records
        row, end = -1, len(table.keys)
        while row < end:
            found: dict[int, list[ChunkKey]] = {}
            for _ in range(MAX_BATCH_KEYS):
                row = table.states.find(ReplicaState.COMPLETE, row + 1, end)
                if row < 0:
                    row = end
                    break
                found.setdefault(table.segments[row], []).append(table.keys[row])
            for record, keys in [(records[number], keys) for number, keys in found.items() if number in records]:
                yield record.segment.node_id, record.segment.id, keys
