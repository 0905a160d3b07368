"""Faults in how an engine puts documents where they stand, for tests of what sees them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from engines.paged.runner import RowMove

FAULTS: dict[str, Callable[[Sequence[RowMove]], list[RowMove]]] = {
    "turned too far": lambda moves: [
        replace(move, position=move.position + 9) if move.position != move.computed_at else move for move in moves
    ],
    "not turned": lambda moves: [replace(move, position=move.computed_at) for move in moves],
    "a wrong slice": lambda moves: [replace(move, source=move.source[::-1]) for move in moves],
    "swapped documents": lambda moves: [
        replace(move, source=other.source) for move, other in zip(moves, moves[::-1], strict=True)
    ],
}
"""What each makes of the moves of a step."""


def spoil(runner: Any, fault: str) -> None:
    """Every move that a ModelRunner makes has that fault from now on."""
    right, wrong = runner.move, FAULTS[fault]

    async def move(moves: Sequence[RowMove], fresh: Sequence[int]) -> None:
        await right(wrong(moves), fresh)

    runner.move = move
