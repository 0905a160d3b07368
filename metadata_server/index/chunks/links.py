"""Which chunk continues which, as callers say it: written into the table once, when a chunk is reserved, and later only
where that is not known yet.

Who continues whom is not in a key: it is learned from the order of keys in one call, and unknown of what was found
after a restart until somebody asks for it. Owns what is known of chunks that are still to come.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from kvcore.eviction.rows import of_rows
from kvcore.types import ChunkKey
from metadata_server.index.chunks.rows import NOTHING, ReplicaTable


class ChunkLinks:
    """Mutated by ReplicaIndex only."""

    def __init__(self, table: ReplicaTable, max_expected: int, row_in: Callable[[ChunkKey, int], int | None]) -> None:
        """`max_expected`: links known of chunks that are still to come; the oldest are forgotten. `row_in`: a key's
        replica in the segment of a number."""
        self._table = table
        self._row_in = row_in
        self._expected: OrderedDict[ChunkKey, ChunkKey] = OrderedDict()
        self._max_expected = max_expected

    def __repr__(self) -> str:
        return f"<ChunkLinks to {len(self._expected)} chunks that are still to come>"

    def told(self, keys: Sequence[ChunkKey], rows: Sequence[int], copies: Mapping[ChunkKey, Sequence[int]]) -> None:
        """Each of `keys` continues the one before it. `rows`: of the first ones, not none; `copies`: further rows."""
        if len(rows) < len(keys):
            self._expected[keys[len(rows)]] = keys[len(rows) - 1]
            if len(self._expected) > self._max_expected:
                self._expected.popitem(last=False)
        parents = self._table.parents
        if not copies and [*of_rows(rows[1:])(parents)] == rows[:-1]:
            return
        for at in range(len(rows) - 1, 0, -1):  # from the end, so that none has been joined to what came before it
            if parents[rows[at]] != rows[at - 1]:
                self._join(rows[at], keys[at - 1])
            for row in copies.get(keys[at], ()):
                self._join(row, keys[at - 1])

    def came(self, keys: Sequence[ChunkKey], rows: Sequence[int], parent: ChunkKey | None, *, in_order: bool) -> None:
        """Chunks are reserved in one segment. `parent`: what the first one continues, if its writer says so;
        `in_order`: each other one continues the one before it."""
        table = self._table
        if parent is not None:
            self._join(rows[0], parent)
        elif self._expected:
            for key, row in zip(keys[:1] if in_order else keys, rows, strict=False):
                if (expected := self._expected.pop(key, None)) is not None:
                    self._join(row, expected)
        if in_order:
            parents, children = table.parents, table.children
            for before, row in pairwise(rows):
                parents[row] = before
                children[before] += 1

    def _join(self, row: int, parent: ChunkKey) -> None:
        """`row` continues the replica of `parent` in its segment, if there is one, and if it continues none that is
        there."""
        table = self._table
        known = table.parents[row]
        if known >= 0 and table.states[known] != NOTHING:
            return
        before = self._row_in(parent, table.segments[row])
        if before is None:
            return
        gone = table.chains.left(row)
        if gone >= 0:
            table.release(gone)
        table.chains.join(row, before)
