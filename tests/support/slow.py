"""Which parameters of a test are slow ones, and how many seeds slow tests try."""

import os
from collections.abc import Collection, Iterable
from typing import Any

import pytest

TIMES = int(os.environ.get("KVFERRY_SEEDS", "1"))
"""So many times the seeds that `make test` tries. By hand: `KVFERRY_SEEDS=10 pytest tests/sim -m slow --timeout 0`."""


def seeds(count: int) -> int:
    """How many to try where `make test` tries so many, or so many blocks of them."""
    return count * TIMES


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """`values` for a test's parameter: those that are not in `quick` make slow tests."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
