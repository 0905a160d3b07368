"""Which parameters of a test are slow ones."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """`values` for a test's parameter: those that are not in `quick` make slow tests."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
