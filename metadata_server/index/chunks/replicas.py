"""Which replicas there are and by which key they are found; every change of what is complete becomes an event.

Owns generations and the moves RESERVED -> COMPLETE | RETIRING -> gone. Knows nothing of time and nodes. Invariants:
`complete` with `copies`, and `writing`, list exactly the replicas in that state; a key has one in a segment at most.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import cast

from kvcore.eviction.rows import of_rows
from kvcore.types import ChunkKey, OwnerTag, ReplicaRef, Segment
from metadata_server.index.chunks.changes import PendingChanges
from metadata_server.index.chunks.gone import GoneSegments
from metadata_server.index.chunks.latest import Grant, LatestRows
from metadata_server.index.chunks.links import ChunkLinks
from metadata_server.index.chunks.placement import Place
from metadata_server.index.chunks.rooms import SegmentRooms
from metadata_server.index.chunks.rows import NOTHING, ReplicaState, ReplicaTable
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.event_log import EventLog
from metadata_server.index.limits import IndexLimits
from metadata_server.index.pins import Pins
from metadata_server.messages import EventKind, ManifestEntry

_COMPLETE, _RESERVED = ReplicaState.COMPLETE, ReplicaState.RESERVED


class ReplicaIndex:
    """Mutated by MetadataState only. Events wait until `publish`, so that one call's changes share events."""

    def __init__(
        self,
        log: EventLog,
        first_generation: int,
        pins: Pins,
        table: ReplicaTable,
        limits: IndexLimits,
        *,
        step: int = 1,
    ) -> None:
        """`step`: between generations. Of several partitions each has those of one remainder."""
        self.table = table
        self.rooms = SegmentRooms()
        self.complete: dict[ChunkKey, int] = {}
        """The row of each key's complete replica, of several that which came first; …"""
        self.copies: dict[ChunkKey, tuple[int, ...]] = {}
        """… and of those that came later."""
        self.writing: dict[ChunkKey, tuple[int, ...]] = {}
        self.grants: dict[int, Grant] = {}
        """Of each reservation, by its id."""
        self._pins = pins
        self._generation, self._step = first_generation, step
        self._latest = LatestRows(limits.max_known_commits, step)
        self.gone = GoneSegments(table, partial(self.forget, emit_event=False), limits.most_swept)
        self._links = ChunkLinks(table, limits.max_expected_links, self.row_in)
        self._changes = PendingChanges(log)

    def __repr__(self) -> str:
        counts = f"{len(self.complete)} keys complete, {len(self.writing)} being written"
        return f"<ReplicaIndex {counts}, {len(self.table)} rows>"

    # --- looking -------------------------------------------------------------------------------------------------

    def rows(self, key: ChunkKey) -> tuple[int, ...]:
        """The key's complete replicas."""
        if self.gone:
            self._forget_gone((key,))
        return self._there(key)

    def prefix(self, keys: Sequence[ChunkKey]) -> list[int]:
        """The first complete replica of each of the longest prefix of `keys` that has any."""
        if self.gone:
            self._forget_gone(keys)
        found = [*map(self.complete.get, keys)]
        if None in found:
            del found[found.index(None) :]
        return cast(list[int], found)

    def holds(self, record: SegmentRecord, entry: ManifestEntry) -> bool:
        """Whether exactly that is complete in the segment."""
        table = self.table
        return any(
            (table.segments[row], table.offsets[row], table.lengths[row], table.generations[row])
            == (record.number, entry.offset, entry.length, entry.generation)
            for row in self.rows(entry.key)
        )

    def row_in(self, key: ChunkKey, number: int) -> int | None:
        """The key's replica in the segment of that number, complete or being written; None: it has none there."""
        there = (*self.rows(key), *self.writing.get(key, ()))
        return next((row for row in there if self.table.segments[row] == number), None)

    def keys_in(self, record: SegmentRecord) -> list[ChunkKey]:
        """What can be read in a segment."""
        return [*map(self.table.keys.__getitem__, record.complete())]

    def key_of(self, number: int) -> ChunkKey:
        """Of a reservation that `committed` says was committed, or that was committed by this call."""
        row = self._latest.row(number)
        assert row is not None, "it was reserved"
        return self.table.keys[row]

    def record(self, row: int) -> SegmentRecord:
        """The segment that a replica lies in."""
        return self.rooms.records[self.table.segments[row]]

    def refs(self, rows: Sequence[int]) -> list[ReplicaRef]:
        """Where replicas lie."""
        table, values = self.table, of_rows(rows)
        numbers, generations = values(table.segments), values(table.generations)
        ids = {number: self.rooms.records[number].segment.id for number in set(numbers)}
        names, extents = map(ids.__getitem__, numbers), (values(table.offsets), values(table.lengths))
        return [*map(ReplicaRef, generations, values(table.keys), names, *extents, generations)]

    def segments_of(self, rows: Sequence[int]) -> list[Segment]:
        """The segments that replicas lie in, each once."""
        return [self.rooms.records[number].segment for number in self._numbers(rows)]

    def bytes_of(self, rows: Sequence[int]) -> int:
        """What replicas take, headers included."""
        return sum(of_rows(rows)(self.table.lengths))

    def writers(self, key: ChunkKey) -> list[str]:
        """The nodes with a reservation for the key, that with the oldest first."""
        there = self.writing.get(key)
        return [self.grants[self.table.generations[row]].node_id for row in there] if there else []

    def committed(self, number: int, writer: int) -> bool:
        """Whether the reservation `number` of this writer, one of the latest, was committed and is still there."""
        row, table = self._latest.row(number), self.table
        if row is None:
            return False
        return table.generations[row] == number and table.states[row] == _COMPLETE and table.writers[row] == writer

    # --- use -----------------------------------------------------------------------------------------------------

    def use(self, rows: Sequence[int]) -> None:
        """Complete replicas are used; of a prompt the last one comes first: its head shall be evicted last."""
        for number, there in self._by_segment(rows):
            self.rooms.records[number].use(there)

    def own(self, rows: Iterable[int], owner: OwnerTag) -> None:
        """Say whose replicas they are, where that is not known yet."""
        for row in rows:
            self.record(row).own(row, owner)

    def pin(self, rows: Iterable[int]) -> None:
        """Keep complete replicas from eviction."""
        for row in rows:
            self.table.pin(row)

    def unpin(self, rows: Iterable[int]) -> None:
        """Undo one `pin` of each; those with none left may be evicted again, in this order."""
        table = self.table
        ended = [row for row in rows if table.unpin(row) and table.states[row] == _COMPLETE]
        for number, there in self._by_segment(ended):
            if number not in self.gone:
                self.rooms.records[number].refresh(there)

    def link(self, keys: Sequence[ChunkKey], rows: Sequence[int]) -> None:
        """Each of `keys` continues the one before it; `rows` are those of a prefix of them that is there. What comes
        next is what its asker will store."""
        if rows:
            self._links.told(keys, rows, self.copies)

    # --- change --------------------------------------------------------------------------------------------------

    def reserve(
        self,
        keys: Sequence[ChunkKey],
        length: int,
        place: Place,
        grant: Grant,
        *,
        parent: ChunkKey | None,
        in_order: bool,
    ) -> list[int]:
        """Reservations of distinct keys, one for each offset of `place`. `parent`: what the first one continues, if
        that is known; `in_order`: each other one continues the one before it."""
        step, record, offsets = self._step, place.record, place.offsets
        ids = range(self._generation + step, self._generation + step * len(offsets) + 1, step)
        self._generation += step * len(offsets)
        extents = zip(keys, offsets, repeat(length), ids)
        rows = self.table.new(len(offsets), extents, segment=record.number, writer=grant.writer)
        record.reserve(rows)
        self._latest.note(ids, rows)
        if self.writing.keys().isdisjoint(keys):
            self.writing.update(zip(keys, zip(rows), strict=True))
        else:
            for key, row in zip(keys, rows, strict=True):
                self.writing[key] = (*self.writing.get(key, ()), row)
        grant.rows.update(zip(ids, rows, strict=True))
        self.grants.update(dict.fromkeys(ids, grant))
        self._links.came(keys, rows, parent, in_order=in_order)
        return rows

    def adopt(self, entries: Sequence[ManifestEntry], record: SegmentRecord) -> None:
        """Complete replicas of distinct keys that were found in their segment, of which it has none; those that come
        first will be evicted first. Later reservations get generations above theirs."""
        if not entries:
            return
        extents = [(entry.key, entry.offset, entry.length, entry.generation) for entry in entries]
        rows = self.table.new(len(entries), extents, segment=record.number, writer=-1)
        if (newest := max(entry.generation for entry in entries)) > self._generation:
            self._generation = newest + (self._generation - newest) % self._step
        record.adopt(rows, [entry.owner for entry in entries])
        self._list_complete(rows)

    def commit(self, rows: Sequence[int]) -> None:
        """Make reserved replicas, in the order of their prefix, visible; its tail will be evicted first."""
        keys = of_rows(rows)(self.table.keys)
        if max(map(len, map(self.writing.__getitem__, keys)), default=0) == 1:  # nobody else is at any of them
            deque(map(self.writing.pop, keys), maxlen=0)
        else:
            for row in rows:
                self._unlist(self.writing, row)
        for number, there in self._by_segment(rows):
            self.rooms.records[number].commit(there)
        self._list_complete(rows)

    def retire(self, row: int) -> None:
        """Forget a reservation, or a complete replica; its room stays taken until `remove`."""
        if self.table.states[row] == _COMPLETE:
            self._completes_no_more(row)
        else:
            self._unlist(self.writing, row)
        self.record(row).retire(row)

    def remove(self, row: int) -> None:
        """Forget a replica in any state and free its room."""
        self.record(row).remove(row)
        self.forget([row])

    def forget(self, rows: Sequence[int], *, emit_event: bool = True) -> None:
        """Forget replicas whose segment has given them up. `emit_event` false: another event tells of it."""
        table = self.table
        for row in rows:
            if table.states[row] == _COMPLETE:
                self._completes_no_more(row, emit_event=emit_event)
            elif table.states[row] == _RESERVED:
                self._unlist(self.writing, row)
            table.drop(row)

    def drop(self, record: SegmentRecord, *, emit_event: bool) -> None:
        """The segment is no longer a live node's. From now on nothing finds what lay there, of which nothing is
        reserved; where it is much, it is forgotten by and by (`GoneSegments`). `emit_event` as of `forget`."""
        self.rooms.remove(record)
        if emit_event:
            self._changes.note(EventKind.REMOVED, record, self.keys_in(record))
        self.gone.add(record)

    def publish(self) -> None:
        """Put what has changed into the event log."""
        self._changes.publish()

    def check(self) -> None:
        """Assert every invariant. For tests."""
        assert not len(self._changes), "unpublished changes"
        self.table.check()
        self.rooms.check()
        records = (*self.rooms.records.values(), *self.gone)
        table, rows = self.table, [row for record in records for row in record.rows()]
        assert len(rows) == sum(state != NOTHING for state in table.states)
        listed = [(key, row) for key in self.complete for row in self._there(key)]
        being_written = [(key, row) for key, there in self.writing.items() for row in there]
        for pairs, state in ((listed, _COMPLETE), (being_written, _RESERVED)):
            assert all(table.keys[row] == key and table.states[row] == state for key, row in pairs)
            assert {row for _, row in pairs} == {row for row in rows if table.states[row] == state}
        where = [(key, table.segments[row]) for key, row in (*listed, *being_written)]
        assert len(where) == len(set(where)), "a key twice in one segment"
        assert all(self.copies.values()) and self.copies.keys() <= self.complete.keys() and all(self.writing.values())
        reserved = {number: row for grant in self.grants.values() for number, row in grant.rows.items()}
        assert (
            reserved == {table.generations[row]: row for _, row in being_written}
            and reserved.keys() == self.grants.keys()
        )
        assert all(table.generations[row] <= self._generation for row in rows)

    # --- inside --------------------------------------------------------------------------------------------------

    def _numbers(self, rows: Sequence[int]) -> Iterable[int]:
        return dict.fromkeys(of_rows(rows)(self.table.segments))

    def _by_segment(self, rows: Sequence[int]) -> Iterable[tuple[int, Sequence[int]]]:
        """Rows by the number of their segment, in the same order."""
        numbers = self.table.segments
        found = [*self._numbers(rows)]
        if len(found) == 1:
            return [(found[0], rows)]
        return [(number, [row for row in rows if numbers[row] == number]) for number in found]

    def _forget_gone(self, keys: Iterable[ChunkKey]) -> None:
        """Forget what is left of these in segments that are gone."""
        for key in keys:
            self.gone.forget(self._there(key))

    def _there(self, key: ChunkKey) -> tuple[int, ...]:
        first = self.complete.get(key)
        return () if first is None else (first, *self.copies.get(key, ()))

    def _list_complete(self, rows: Sequence[int]) -> None:
        keys = of_rows(rows)(self.table.keys)
        if self.complete.keys().isdisjoint(keys) and len(set(keys)) == len(keys):
            self.complete.update(zip(keys, rows, strict=True))
        else:
            for key, row in zip(keys, rows, strict=True):
                if self.complete.setdefault(key, row) != row:
                    self.copies[key] = (*self.copies.get(key, ()), row)
        for number, there in self._by_segment(rows):
            self._changes.note(EventKind.STORED, self.rooms.records[number], [*of_rows(there)(self.table.keys)])
        if self._pins:
            for row in rows:
                self._pins.came(row)

    def _completes_no_more(self, row: int, *, emit_event: bool = True) -> None:
        self._unlist_complete(row)
        if self._pins:
            self._pins.gone(row)
        if emit_event:
            self._changes.note(EventKind.REMOVED, self.record(row), [self.table.keys[row]])

    def _unlist_complete(self, row: int) -> None:
        key = self.table.keys[row]
        copies = self.copies.get(key)
        if copies is None:
            del self.complete[key]
            return
        first, *others = (other for other in (self.complete[key], *copies) if other != row)
        self.complete[key] = first
        if others:
            self.copies[key] = tuple(others)
        else:
            del self.copies[key]

    def _unlist(self, listing: dict[ChunkKey, tuple[int, ...]], row: int) -> None:
        key = self.table.keys[row]
        there = listing.pop(key)
        if len(there) > 1:
            listing[key] = tuple(other for other in there if other != row)
