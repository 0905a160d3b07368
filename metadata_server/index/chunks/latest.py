"""What one call has reserved, and the rows of the latest reservations by their ids: what a commit that is told twice is
looked up in. Pure.

Ids follow each other in steps of the same length, so that a ring holds the last ones.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Grant:
    """What one call has reserved and neither committed nor given back."""

    number: int
    node_id: str
    """The writer, and …"""
    writer: int
    """… its number."""
    began: float
    name: int = 0
    """What its writer calls it; 0: nothing."""
    rows: dict[int, int] = field(default_factory=dict)
    """By the reservation's id."""


class LatestRows:
    """Of the last `size` reservations. It takes memory when the first one comes."""

    def __init__(self, size: int, step: int) -> None:
        self._size, self._step = size, step
        self._rows = array("i")

    def note(self, ids: range, rows: Sequence[int]) -> None:
        """These are the latest."""
        if not self._rows:
            self._rows = array("i", [0]) * self._size
        there, size, step = self._rows, self._size, self._step
        if (at := ids.start // step % size) + len(rows) <= size:
            there[at : at + len(rows)] = array("i", rows)
        else:
            for number, row in zip(ids, rows, strict=True):
                there[number // step % size] = row

    def row(self, number: int) -> int | None:
        """Of that reservation, if it was one of the latest; else of another one. None: there was none yet."""
        return self._rows[number // self._step % self._size] if self._rows else None
