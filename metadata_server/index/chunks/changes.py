"""Changes of what is complete that are not in the event log yet, so that one call's share events. Pure."""

from kvcore.types import ChunkKey
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.event_log import EventLog
from metadata_server.messages import EventKind


class PendingChanges:
    """In the order in which they came."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._changes: list[tuple[EventKind, SegmentRecord, list[ChunkKey]]] = []

    def __len__(self) -> int:
        return len(self._changes)

    def note(self, kind: EventKind, record: SegmentRecord, keys: list[ChunkKey]) -> None:
        """These came to the segment, or left it. The list is given away."""
        last = self._changes[-1] if self._changes else None
        if last is not None and last[0] is kind and last[1] is record:
            last[2].extend(keys)
        else:
            self._changes.append((kind, record, keys))

    def publish(self) -> None:
        """Put them into the event log."""
        for kind, record, keys in self._changes:
            self._log.append(kind, record.segment.node_id, record.segment.id, keys)
        self._changes.clear()
