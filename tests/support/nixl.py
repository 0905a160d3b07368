"""Tests of NIXL are skipped where its wheel is not installed: it is no dependency of the default environment."""

import os

import pytest

from kvcore.errors import ConfigError
from transfer.nixl.binding import load_nixl


def missing_nixl() -> str:
    """Why NIXL cannot be used here, or empty."""
    try:
        load_nixl()
    except ConfigError as error:
        return error.message
    return ""


_missing = missing_nixl()
_skip = pytest.mark.skipif(bool(_missing) and not os.environ.get("NIXL_TESTS"), reason=_missing or "NIXL is here")
needs_nixl = (pytest.mark.ucx, _skip)
"""Marks of a test that opens NIXL, which is UCX inside; `NIXL_TESTS=1` makes its absence a failure."""
