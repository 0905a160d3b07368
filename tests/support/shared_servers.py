"""Servers that all tests of a module share: whoever asks first opens one, and it ends with the module, whichever module
that is (tests/conftest.py)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

Server = TypeVar("Server")

_open: dict[Callable[[], AbstractContextManager[Any]], Any] = {}
_ends = ExitStack()


def shared(open_one: Callable[[], AbstractContextManager[Server]]) -> Server:
    """What `open_one()` gives, the same to everybody until `end_shared`."""
    if open_one not in _open:
        _open[open_one] = _ends.enter_context(open_one())
    server: Server = _open[open_one]
    return server


def end_shared() -> None:
    """All of them, the youngest first."""
    _open.clear()
    _ends.close()
