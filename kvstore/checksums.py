"""Where checksums and ciphers run: over little at once, over much wherever `run_blocking` takes them."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from kvstore.types import RunBlocking

_T = TypeVar("_T")


async def run_sized(run_blocking: RunBlocking, num_bytes: int, function: Callable[[], _T], *, inline_bytes: int) -> _T:
    """`function`, which goes over `num_bytes`: on this thread up to `inline_bytes`, else by `run_blocking`. It has
    ended when this returns or raises: else it might write into memory that is another's since the caller was
    cancelled."""
    if num_bytes <= inline_bytes:
        return function()
    running = asyncio.ensure_future(run_blocking(function))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        running.exception()  # seen
        raise cancelled
    return running.result()
