"""Where checksums run: small ones at once, large ones wherever `run_blocking` takes them."""

from collections.abc import Callable
from typing import TypeVar

from kvstore.types import RunBlocking

_T = TypeVar("_T")


async def run_sized(run_blocking: RunBlocking, num_bytes: int, function: Callable[[], _T], *, inline_bytes: int) -> _T:
    """`function`, which goes over `num_bytes`: on this thread up to `inline_bytes`, else by `run_blocking`."""
    return function() if num_bytes <= inline_bytes else await run_blocking(function)
