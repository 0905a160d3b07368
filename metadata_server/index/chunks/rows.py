"""Every replica that there is, as a row of a table of columns: about 70 bytes each, and nothing for the collector.

Owns which rows are in use. Pure. A row that is given up is used again only when no read lease and no continuation of
its chunk knows it any more. Invariant: a row without a replica is either free or known to one of these.
"""

from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum

from kvcore.eviction.row_chains import FIRST, RowChains
from kvcore.eviction.rows import of_rows
from kvcore.extents import aligned
from kvcore.types import ChunkKey

_MOST_AT_ONCE = 4096
"""Rows that are added in one go: what takes a fraction of a millisecond."""


class ReplicaState(IntEnum):
    """The life of one replica:

    | from | to | when |
    |---|---|---|
    | new | reserved | room is given to a writer |
    | new | complete | found by its header, in a manifest |
    | reserved | complete | commit |
    | reserved | retiring | abort; its time is up; its writer died |
    | reserved | gone | its segment was dropped |
    | complete | retiring | quarantined, and others still read from its room |
    | retiring | gone | the grace time is over and nobody reads there; its segment was dropped |
    | complete | gone | evicted; quarantined; its segment was dropped |
    """

    RESERVED = 1
    COMPLETE = 2
    RETIRING = 3
    """Its writer may still be writing, or others reading: nobody else may use the room yet."""


TRANSITIONS: dict[ReplicaState | None, frozenset[ReplicaState | None]] = {
    None: frozenset({ReplicaState.RESERVED, ReplicaState.COMPLETE}),
    ReplicaState.RESERVED: frozenset({ReplicaState.COMPLETE, ReplicaState.RETIRING, None}),
    ReplicaState.RETIRING: frozenset({None}),
    ReplicaState.COMPLETE: frozenset({ReplicaState.RETIRING, None}),
}
"""State -> the states that may follow; None: not there yet, or no longer."""

NOTHING = 0
"""In the column of states: no replica."""


class ReplicaTable:
    """The columns. Whoever moves a replica on writes them; `new` and `drop` begin and end a row's use."""

    def __init__(self) -> None:
        self.keys: list[ChunkKey] = []
        self.offsets, self.lengths = array("q"), array("q")
        self.generations = array("q")
        """Also the id of a replica that was reserved."""
        self.last_uses = array("q")
        """The call of the last use."""
        self.segments = array("i")
        """Number of the segment's record."""
        self.writers = array("i")
        """Number of the node that reserved it; -1: found by its header."""
        self.states = bytearray()
        self.parents, self.children = array("i"), array("i")
        self.chains = RowChains(self.parents, self.children)
        self.older, self.newer = array("i"), array("i")
        """Neighbours in the segment's order of eviction."""
        self.pins: dict[int, int] = {}
        """How many keep a row from eviction, of those that anybody keeps."""
        self._free: list[int] = []
        self._ints = (self.segments, self.writers, self.parents, self.children, self.older, self.newer)
        self._longs = (self.offsets, self.lengths, self.generations, self.last_uses)

    def __repr__(self) -> str:
        return f"<ReplicaTable {len(self)} of {len(self.keys)} rows, {len(self.pins)} pinned>"

    def __len__(self) -> int:
        """Rows in use."""
        return len(self.keys) - len(self._free)

    def new(
        self, count: int, extents: Iterable[tuple[ChunkKey, int, int, int]], *, segment: int, writer: int
    ) -> list[int]:
        """Rows for replicas whose state is to be set. `extents`: key, offset, length, generation; at least `count`."""
        free = self._free
        while len(free) < count:
            self._grow()
        taken = free[len(free) - count :]
        del free[len(free) - count :]
        keys, offsets, lengths, generations = self.keys, self.offsets, self.lengths, self.generations
        segments, writers = self.segments, self.writers
        for row, (key, offset, length, generation) in zip(taken, extents, strict=False):
            keys[row] = key
            offsets[row] = offset
            lengths[row] = length
            generations[row] = generation
            segments[row] = segment
            writers[row] = writer
        return taken

    def room_of(self, rows: Sequence[int]) -> int:
        """Bytes of segments that replicas take."""
        lengths = of_rows(rows)(self.lengths)
        if lengths and lengths.count(lengths[0]) == len(lengths):  # as most are
            return len(lengths) * aligned(lengths[0])
        return sum(map(aligned, lengths))

    def kept(self, row: int) -> bool:
        """Whether it may not be evicted."""
        return row in self.pins or self.children[row] > 0

    def pin(self, row: int) -> None:
        """Keep it from eviction, and the row from being used again."""
        self.pins[row] = self.pins.get(row, 0) + 1

    def unpin(self, row: int) -> bool:
        """Undo one `pin`. Whether that was the last one of a replica that is still there."""
        left = self.pins[row] - 1
        if left:
            self.pins[row] = left
            return False
        del self.pins[row]
        if self.states[row] == NOTHING:
            self.release(row)
            return False
        return True

    def drop(self, row: int) -> None:
        """The replica is gone; what it continued must have been told."""
        self.states[row] = NOTHING
        self.release(row)

    def release(self, row: int) -> None:
        """Use the row of a replica that is gone again, if nobody knows it."""
        if row not in self.pins and not self.children[row]:
            self.keys[row] = ChunkKey(b"")
            self._free.append(row)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        free = set(self._free)
        assert len(free) == len(self._free)
        rows = range(len(self.keys))
        self.chains.check(row for row in rows if row not in free)
        for row in rows:
            if row in free:
                assert self.states[row] == NOTHING and not self.keys[row] and not self.kept(row)
            elif self.states[row] == NOTHING:
                assert self.kept(row) and self.parents[row] == FIRST
        assert all(count > 0 for count in self.pins.values())

    def _grow(self) -> None:
        start = len(self.keys)
        count = min(_MOST_AT_ONCE, max(64, start))
        self.keys += [ChunkKey(b"")] * count
        self.states += bytes(count)
        for column in self._ints:
            column.frombytes(bytes(4 * count))
        for column in self._longs:
            column.frombytes(bytes(8 * count))
        self.parents[start:] = array("i", [FIRST]) * count
        self._free[:0] = range(start + count - 1, start - 1, -1)
