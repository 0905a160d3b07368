"""Segments that are gone, while what lay in them is forgotten slice by slice: no call waits for a whole segment's end.

Owns their records, which are listed nowhere else. Invariant: all that is left in them is complete, and whoever looks a
key up has what is left of it forgotten first (`ReplicaIndex.rows`, `prefix`), so that nobody finds it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from metadata_server.index.chunks.rows import ReplicaTable
from metadata_server.index.chunks.segments import SegmentRecord


class GoneSegments:
    """Mutated by ReplicaIndex only."""

    def __init__(self, table: ReplicaTable, forget: Callable[[Sequence[int]], None], most_swept: int) -> None:
        """`forget`: takes rows that their record has given up out of the index; `most_swept`: replicas a slice."""
        self._table = table
        self._forget = forget
        self._most_swept = most_swept
        self._records: dict[int, SegmentRecord] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[SegmentRecord]:
        return iter(self._records.values())

    def __contains__(self, number: int) -> bool:
        return number in self._records

    def __repr__(self) -> str:
        return f"<GoneSegments {len(self)}, {sum(record.num_complete for record in self)} replicas left>"

    def add(self, record: SegmentRecord) -> None:
        """One that nobody has any more. A small one is forgotten at once."""
        record.gone = True
        self._records[record.number] = record
        if record.num_complete <= self._most_swept:
            self._sweep(record)

    def forget(self, rows: Sequence[int]) -> None:
        """Forget those of the complete `rows` that lie in such segments."""
        for row in rows:
            record = self._records.get(self._table.segments[row])
            if record is not None:
                record.remove(row)
                self._forget([row])

    def sweep(self) -> bool:
        """Forget a slice; whether there is more."""
        for record in self:
            self._sweep(record)
            break
        return bool(self._records)

    def _sweep(self, record: SegmentRecord) -> None:
        rows = [*islice(record.complete(), self._most_swept)]
        for row in rows:
            record.remove(row)
        self._forget(rows)
        if not record.num_complete:
            del self._records[record.number]
            record.clear()
