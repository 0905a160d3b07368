"""The changes of the index, numbered, in a ring: what subscribers replay.

Owns sequence numbers and batching; knows nothing of subscribers, each of which keeps its own position. Invariants: seq
grows by one; the last `capacity` events are kept; a batch ends with the event that brings it to MAX_BATCH_KEYS keys.
"""

from collections.abc import Iterable, Iterator

from kvcore.types import ChunkKey, NodeInfo
from metadata_server.messages import Event, EventBatch, EventKind

MAX_EVENT_KEYS = 512
MAX_BATCH_KEYS = 4096


class EventLog:
    """Events of one epoch; the first has seq 1."""

    def __init__(self, epoch: str, capacity: int) -> None:
        """`capacity` in events, at least 1."""
        self.epoch = epoch
        self.next_seq = 1
        self._ring: list[Event | None] = [None] * capacity

    @property
    def first_seq(self) -> int:
        """The oldest event that is still here (`next_seq` if none)."""
        return max(1, self.next_seq - len(self._ring))

    def append(
        self,
        kind: EventKind,
        node_id: str,
        segment_id: str = "",
        keys: list[ChunkKey] | None = None,
        node: NodeInfo | None = None,
    ) -> None:
        """Publish one change; keys are cut into events of MAX_EVENT_KEYS."""
        keys = keys or []
        for start in range(0, len(keys) or 1, MAX_EVENT_KEYS):
            part = tuple(keys[start : start + MAX_EVENT_KEYS])  # the collector looks at it once, and not in a list
            event = Event(seq=self.next_seq, kind=kind, node_id=node_id, segment_id=segment_id, keys=part, node=node)
            self._ring[self.next_seq % len(self._ring)] = event
            self.next_seq += 1

    def has(self, epoch: str, from_seq: int) -> bool:
        """Whether a subscriber at that position can go on by replay."""
        return epoch == self.epoch and self.first_seq <= from_seq <= self.next_seq

    def behind(self, position: int) -> int:
        """Events from there on, as far as they are kept."""
        return self.next_seq - max(position, self.first_seq)

    def since(self, from_seq: int) -> Iterator[Event]:
        """Events from `from_seq` on, which `has` allowed."""
        for seq in range(from_seq, self.next_seq):
            event = self._ring[seq % len(self._ring)]
            assert event is not None and event.seq == seq
            yield event

    def replay(self, from_seq: int) -> EventBatch:
        """One batch from `from_seq` on, which `has` allowed; without events there is nothing new."""
        batch, keys = [], 0
        for event in self.since(from_seq):
            batch.append(event)
            keys += 1 + len(event.keys)
            if keys >= MAX_BATCH_KEYS:
                break
        return EventBatch(epoch=self.epoch, next_seq=from_seq + len(batch), events=batch)

    def snapshot(
        self,
        nodes: Iterable[NodeInfo],
        stored: Iterable[tuple[str, str, list[ChunkKey]]],
        on_disk: Iterable[tuple[str, list[ChunkKey]]] = (),
    ) -> Iterator[EventBatch]:
        """Batches that stand for the whole state of now, the last one empty: the mark of its end.

        `stored`: (node id, segment id, keys), and `on_disk`: (node id, keys), taken as they are needed. Where they
        change meanwhile, the batches and all events from their `next_seq` on are the state.
        """
        next_seq, batch, keys, first = self.next_seq, list[Event](), 0, True
        for event in _as_events(next_seq - 1, nodes, stored, on_disk):
            batch.append(event)
            keys += 1 + len(event.keys)
            if keys >= MAX_BATCH_KEYS:
                yield EventBatch(epoch=self.epoch, reset=first, next_seq=next_seq, events=batch)
                batch, keys, first = [], 0, False
        if batch or first:
            yield EventBatch(epoch=self.epoch, reset=first, next_seq=next_seq, events=batch)
        yield EventBatch(epoch=self.epoch, next_seq=next_seq)


def _as_events(
    seq: int,
    nodes: Iterable[NodeInfo],
    stored: Iterable[tuple[str, str, list[ChunkKey]]],
    on_disk: Iterable[tuple[str, list[ChunkKey]]],
) -> Iterator[Event]:
    for node in nodes:
        yield Event(seq=seq, kind=EventKind.NODE_UP, node_id=node.id, node=node)
    for node_id, segment_id, keys in stored:
        for start in range(0, len(keys), MAX_EVENT_KEYS):
            part = keys[start : start + MAX_EVENT_KEYS]
            yield Event(seq=seq, kind=EventKind.STORED, node_id=node_id, segment_id=segment_id, keys=part)
    for node_id, keys in on_disk:
        for start in range(0, len(keys), MAX_EVENT_KEYS):
            yield Event(seq=seq, kind=EventKind.ON_DISK, node_id=node_id, keys=keys[start : start + MAX_EVENT_KEYS])
