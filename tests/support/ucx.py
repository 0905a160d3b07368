"""Tests of UCX are skipped where there is none; in continuous integration that is a failure."""

import os

import pytest

from kvcore.errors import ConfigError
from transfer.ucx_binding import load_library

LIBRARY = os.environ.get("UCX_UNDER_TEST")
"""Path of another libucp than the system's, to hold several UCX to the same tests."""


def missing_ucx() -> str:
    """Why UCX cannot be used here, or empty."""
    try:
        load_library(LIBRARY)
    except ConfigError as error:
        return error.message
    return ""


needs_ucx = pytest.mark.skipif(bool(missing_ucx()) and not os.environ.get("CI"), reason=missing_ucx() or "UCX is here")
