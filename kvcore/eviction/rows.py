"""The policies that keep one order, over rows of a table: the order lies in two of its columns, 8 bytes an entry.

What `kvcore.eviction.queues` does with objects, for tables with millions of rows.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import TypeVar

_NONE = -1


T = TypeVar("T")


def of_rows(rows: Sequence[int]) -> Callable[[Sequence[T]], Sequence[T]]:
    """What takes the values of `rows` out of a column, in half the time that a loop would take."""
    if len(rows) > 1:
        return itemgetter(*rows)
    return lambda column: [column[row] for row in rows]


class RowLru:
    """Least recently used. One of many queues over the same columns: a row is in one of them at most."""

    def __init__(self, older: "array[int]", newer: "array[int]") -> None:
        """`older`, `newer`: of each row its neighbours in the queue that it is in."""
        self._older, self._newer = older, newer
        self._oldest = self._newest = _NONE

    def __repr__(self) -> str:
        return f"<{type(self).__name__} from {self._oldest} to {self._newest}>"

    def __iter__(self) -> Iterator[int]:
        """From the one that goes next on. The queue must not change meanwhile."""
        row = self._oldest
        while row != _NONE:
            yield row
            row = self._newer[row]

    def add(self, row: int) -> None:
        """See `EvictionPolicy`."""
        self._append(row, row)

    def add_all(self, rows: Sequence[int]) -> None:
        """As `add` of one after the other."""
        older, newer, last = self._older, self._newer, self._newest
        for row in rows:
            older[row] = last
            if last == _NONE:
                self._oldest = row
            else:
                newer[last] = row
            last = row
        if rows:
            newer[last] = _NONE
            self._newest = last

    def use(self, row: int) -> None:
        """See `EvictionPolicy`."""
        if row != self._newest:
            self._cut(row, row)
            self._append(row, row)

    def use_all(self, rows: Sequence[int]) -> None:
        """As `use` of one after the other, at least one. What lies together, as prompts do, moves together."""
        following, after = [*of_rows(rows)(self._newer)], [*rows[1:], _NONE]
        following[-1] = _NONE
        ends = [] if following == after else [at for at, row in enumerate(after[:-1]) if following[at] != row]
        if ends and len(set(rows)) < len(rows):  # after the first move of one twice named nothing is as it was
            for row in rows:
                self.use(row)
            return
        start = 0
        for end in (*ends, len(rows) - 1):
            first, last = rows[start], rows[end]
            if last != self._newest:
                self._cut(first, last)
                self._append(first, last)
            start = end + 1

    def refresh(self, row: int) -> None:
        """See `EvictionPolicy`."""
        self.use(row)

    def remove(self, row: int) -> None:
        """See `EvictionPolicy`."""
        self._cut(row, row)

    def take(self) -> tuple[int, int] | None:
        """See `EvictionPolicy`."""
        row = self._oldest
        if row == _NONE:
            return None
        self._cut(row, row)
        return row, 0

    def put_back(self, row: int, place: int) -> None:
        """See `EvictionPolicy`."""
        first = self._oldest
        self._older[row], self._newer[row] = _NONE, first
        if first == _NONE:
            self._newest = row
        else:
            self._older[first] = row
        self._oldest = row

    def evicted(self, row: int, place: int) -> None:
        """See `EvictionPolicy`."""

    def _cut(self, first: int, last: int) -> None:
        before, after = self._older[first], self._newer[last]
        if before == _NONE:
            self._oldest = after
        else:
            self._newer[before] = after
        if after == _NONE:
            self._newest = before
        else:
            self._older[after] = before

    def _append(self, first: int, last: int) -> None:
        before = self._newest
        self._older[first], self._newer[last] = before, _NONE
        if before == _NONE:
            self._oldest = first
        else:
            self._newer[before] = first
        self._newest = last


class RowFifo(RowLru):
    """First in, first out: uses count for nothing."""

    def use(self, row: int) -> None:
        """See `EvictionPolicy`."""

    def use_all(self, rows: Sequence[int]) -> None:
        """See `RowLru`."""

    def refresh(self, row: int) -> None:
        """See `EvictionPolicy`."""
