"""Which row of a table continues which: `kvcore.eviction.chains` in two columns, for tables with millions of rows.

Without its prefix a chunk is of no use to anybody. Chunks are rows of a table, and a chunk continues only what lies in
its own segment: one that waited for what lies elsewhere could fill a segment with prefixes that may not go, and there
would be no room for what is wanted now. Invariant: no chunk comes before itself, whatever is said, so that there is
always one that may go.
"""

from array import array
from collections.abc import Iterable

FIRST = -1
"""Continues nothing that is there."""
UNKNOWN = -2
"""Nobody has said yet what it continues."""


class RowChains:
    """Two columns of a table. Each call is O(1), but for a chunk that is said to continue something only after it was
    continued itself: that walks up to its beginning."""

    def __init__(self, parents: "array[int]", children: "array[int]") -> None:
        """`parents`: of each row the row that it continues, FIRST or UNKNOWN; `children`: how many continue it."""
        self._parents, self._children = parents, children

    def __repr__(self) -> str:
        return f"<RowChains over {len(self._parents)} rows>"

    def join(self, row: int, parent: int) -> None:
        """`row`, which continues nothing so far, continues `parent`, unless it comes before it."""
        parents = self._parents
        if self._children[row]:  # what it continues may be what continues it, as far as what was said goes
            up = parent
            while up >= 0 and up != row:
                up = parents[up]
            if up == row:
                return
        elif row == parent:
            return
        parents[row] = parent
        self._children[parent] += 1

    def left(self, row: int) -> int:
        """It continues nothing any more. Returns the row that nothing continues now; FIRST: there is none."""
        parent = self._parents[row]
        self._parents[row] = FIRST
        if parent < 0:
            return FIRST
        self._children[parent] -= 1
        return FIRST if self._children[parent] else parent

    def check(self, rows: Iterable[int]) -> None:
        """Assert every invariant for `rows`, all that are in use. For tests."""
        children = [0] * len(self._parents)
        for row in rows:
            seen, up = {row}, self._parents[row]
            if up >= 0:
                children[up] += 1
            while up >= 0:
                assert up not in seen, "a chunk continues itself"
                seen.add(up)
                up = self._parents[up]
        assert children == list(self._children)
