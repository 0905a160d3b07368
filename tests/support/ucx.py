"""Tests of UCX are skipped where there is none; in continuous integration that is a failure."""

import os

import pytest
from support.transports import LIBRARY

from kvcore.errors import ConfigError
from transfer.ucx.binding import load_library


def missing_ucx() -> str:
    """Why UCX cannot be used here, or empty."""
    try:
        load_library(LIBRARY)
    except ConfigError as error:
        return error.message
    return ""


_missing = missing_ucx()
_skip = pytest.mark.skipif(bool(_missing) and not os.environ.get("CI"), reason=_missing or "UCX is here")
needs_ucx = (pytest.mark.ucx, _skip)
"""Marks of a test that opens UCX; `make test` runs these by themselves."""
