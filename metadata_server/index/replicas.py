"""Which replicas there are and by which key they are found; every change of what is complete becomes an event.

Owns replica ids, generations and the moves RESERVED -> COMPLETE | RETIRING -> gone. Knows nothing of time and nodes.
Invariants: `complete` and `writing` hold exactly the replicas in that state; a key has one in a segment at most.
"""

from collections.abc import Iterable

from kvcore.types import ChunkKey, ReplicaRef, Segment
from metadata_server.index.event_log import EventLog
from metadata_server.index.pins import Pins
from metadata_server.index.segments import Replica, ReplicaState, SegmentRecord, Writer
from metadata_server.messages import EventKind, ManifestEntry, ReserveItem

_Listing = dict[ChunkKey, tuple[Replica, ...]]
"""Tuples, as the collector lets go of those with nothing for it inside; a list a chunk it would visit each time."""


class ReplicaIndex:
    """Mutated by MetadataState only. Events wait until `publish`, so that one call's changes share events."""

    def __init__(self, log: EventLog, first_generation: int, pins: Pins) -> None:
        self.complete: _Listing = {}
        self.writing: _Listing = {}
        self.replicas: dict[int, Replica] = {}
        self._log = log
        self._pins = pins
        self._generation = first_generation
        self._last_id = first_generation
        self._changes: list[tuple[EventKind, SegmentRecord, list[ChunkKey]]] = []

    def __repr__(self) -> str:
        counts = f"{len(self.complete)} keys complete, {len(self.writing)} being written"
        return f"<ReplicaIndex {counts}, {len(self.replicas)} replicas>"

    def writers(self, key: ChunkKey) -> list[str]:
        """The nodes with a reservation for the key, that with the oldest first."""
        there = self.writing.get(key)
        return [replica.writer.node_id for replica in there if replica.writer is not None] if there else []

    def reserve(
        self, item: ReserveItem, parent: ChunkKey | None, record: SegmentRecord, offset: int, writer: Writer
    ) -> Replica:
        """A new reservation on room that is allocated already. `parent`: what it continues, if that is known."""
        key = item.key
        self._generation += 1
        ref = self._ref(key, item.length, record, offset, self._generation)
        replica = Replica(ref, record, ReplicaState.RESERVED, writer, parent)
        self.writing[key] = (*self.writing.get(key, ()), replica)
        self.replicas[replica.ref.id] = replica
        record.add(replica)
        return replica

    def adopt(self, entry: ManifestEntry, record: SegmentRecord) -> None:
        """A complete replica that was found in its segment. Later reservations get generations above its own."""
        self._generation = max(self._generation, entry.generation)
        ref = self._ref(entry.key, entry.length, record, entry.offset, entry.generation)
        replica = Replica(ref, record, ReplicaState.COMPLETE, None)
        self.replicas[ref.id] = replica
        self._list_complete(replica)
        record.add(replica)
        self._pins.came(replica)

    def commit(self, reserved: list[Replica]) -> None:
        """Make reserved replicas, in the order of their prefix, visible; its tail will be evicted first."""
        for replica in reserved:
            _unlist(self.writing, replica)
            self._list_complete(replica)
        for replica in reversed(reserved):
            replica.record.set_state(replica, ReplicaState.COMPLETE)
        for replica in reserved if self._pins else ():
            self._pins.came(replica)

    def retire(self, replica: Replica) -> None:
        """Forget a reservation, or a complete replica; its room stays taken until `remove`."""
        if replica.state is ReplicaState.COMPLETE:
            if replica.ref.id in self._pins.held:
                replica.record.unpin(replica)
            self._completes_no_more(replica)
        else:
            _unlist(self.writing, replica)
        replica.record.set_state(replica, ReplicaState.RETIRING)

    def remove(self, replica: Replica) -> None:
        """Forget a replica in any state and free its room."""
        replica.record.remove(replica)
        self.forget([replica])

    def forget(self, removed: Iterable[Replica], *, emit_event: bool = True) -> None:
        """Forget replicas whose segment has given them up. `emit_event` false: another event tells of it."""
        for replica in removed:
            del self.replicas[replica.ref.id]
            if replica.state is ReplicaState.COMPLETE:
                self._completes_no_more(replica, emit_event=emit_event)
            elif replica.state is ReplicaState.RESERVED:
                _unlist(self.writing, replica)

    def publish(self) -> None:
        """Put what has changed into the event log."""
        for kind, record, keys in self._changes:
            self._log.append(kind, record.segment.node_id, record.segment.id, keys)
        self._changes.clear()

    def check(self, records: Iterable[SegmentRecord]) -> None:
        """Assert every invariant. For tests."""
        assert not self._changes, "unpublished changes"
        assert self.replicas == {r.ref.id: r for record in records for r in record.replicas()}
        for listing, state in ((self.complete, ReplicaState.COMPLETE), (self.writing, ReplicaState.RESERVED)):
            listed = [(key, r) for key, replicas in listing.items() for r in replicas]
            assert all(listing.values()) and all(r.ref.key == key and r.state is state for key, r in listed)
            assert {r.ref.id for _, r in listed} == {n for n, r in self.replicas.items() if r.state is state}
        for key in self.complete.keys() | self.writing.keys():
            where = [r.ref.segment_id for r in (*self.complete.get(key, ()), *self.writing.get(key, ()))]
            assert len(where) == len(set(where)), f"{key.hex()} twice in one segment"
        assert all(r.ref.generation <= self._generation for r in self.replicas.values())

    def _ref(self, key: ChunkKey, length: int, record: SegmentRecord, offset: int, generation: int) -> ReplicaRef:
        self._last_id += 1
        return ReplicaRef(
            id=self._last_id, key=key, segment_id=record.segment.id, offset=offset, length=length, generation=generation
        )

    def _list_complete(self, replica: Replica) -> None:
        self.complete[replica.ref.key] = (*self.complete.get(replica.ref.key, ()), replica)
        replica.record.chains.came(replica.ref.key, replica.parent)
        self._note(EventKind.STORED, replica)

    def _completes_no_more(self, replica: Replica, *, emit_event: bool = True) -> None:
        _unlist(self.complete, replica)
        if self._pins:
            self._pins.gone(replica)
        if emit_event:
            self._note(EventKind.REMOVED, replica)

    def _note(self, kind: EventKind, replica: Replica) -> None:
        last = self._changes[-1] if self._changes else None
        if last is not None and last[0] is kind and last[1] is replica.record:
            last[2].append(replica.ref.key)
        else:
            self._changes.append((kind, replica.record, [replica.ref.key]))


def _unlist(listing: _Listing, replica: Replica) -> None:
    key = replica.ref.key
    there = listing[key]
    if len(there) == 1:
        del listing[key]
    else:
        listing[key] = tuple(other for other in there if other is not replica)


def segments_of(replicas: Iterable[Replica]) -> list[Segment]:
    """The segments that replicas lie in, each once."""
    found: dict[str, Segment] = {}
    for replica in replicas:
        found[replica.ref.segment_id] = replica.record.segment
    return list(found.values())
