"""How far each node's chunks were looked through for those that are to move: each call goes on where the last ended.

A pass takes the rows as they are at its beginning, the most recently used last; what comes later is the next one's. A
row is looked at anew when its turn comes. Pure.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence

from metadata_server.index.limits import IndexLimits


class MovePass:
    """One look through. `rows` are still to be looked at, `candidates` were and are to move; the next one last."""

    def __init__(self, rows: Iterable[int], why: str = "") -> None:
        """`why` they are looked through: what one purpose passes over may be another's."""
        self.why = why
        self.rows = array("i", rows)
        self.num_rows = len(self.rows)
        self.candidates: list[int] = []
        self.granted = 0
        self.stayed = 0
        """Candidates for which there was no room, or of which a copy is being written."""
        self.again_at = 0.0

    def __repr__(self) -> str:
        return (
            f"<MovePass {len(self.rows)} of {self.num_rows} to look at, {self.granted} granted, {self.stayed} stayed>"
        )

    @property
    def is_over(self) -> bool:
        """Nothing is left of it."""
        return not self.rows and not self.candidates

    @property
    def left(self) -> int:
        """How many have neither left nor were found to lie elsewhere."""
        return len(self.rows) + len(self.candidates) + self.stayed

    def fill(self, is_candidate: Callable[[int], bool], last_uses: Sequence[int], limits: IndexLimits) -> None:
        """Look at rows until there are candidates for a batch, or enough rows were looked at for one call."""
        looked = 0
        while self.rows and len(self.candidates) < limits.max_moves and looked < limits.rows_a_move:
            some = self.rows[-limits.max_moves :]
            del self.rows[-limits.max_moves :]
            looked += len(some)
            self.candidates += filter(is_candidate, some)
        self.candidates.sort(key=last_uses.__getitem__)


class MovePasses:
    """One of each node that moves chunks."""

    def __init__(self, limits: IndexLimits) -> None:
        self._limits = limits
        self._passes: dict[int, MovePass] = {}

    def of(self, number: int, why: str, rows: Callable[[], Iterable[int]], now: float) -> MovePass:
        """That of the node of this number; a new one over `rows` when the last is over, or was for another purpose. One
        in which nothing could move is not begun again at once if it had more rows than one call looks at: the more the
        later."""
        one = self._passes.get(number)
        if one is None or one.why != why or (one.is_over and (one.granted or now >= one.again_at)):
            one = self._passes[number] = MovePass(rows(), why)
            one.again_at = now + max(0, one.num_rows - self._limits.rows_a_move) / self._limits.moved_rows_a_second
        return one

    def keep(self, numbers: Iterable[int]) -> None:
        """Forget all others."""
        self._passes = {number: self._passes[number] for number in numbers if number in self._passes}

    def drop(self, number: int) -> None:
        """The node moves no more."""
        self._passes.pop(number, None)
