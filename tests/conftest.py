"""What all tests run under."""

import gc
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What collecting the tests makes, about a million objects, stays to the end: garbage is not looked for among it,
    then or later. That was a fifth of the time that tests took."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
