"""How long work on the event loop keeps everybody else waiting."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class LoopStalls:
    """`longest_s`: processor time, not wall time, so that it says the same on a loaded machine."""

    longest_s = 0.0

    async def watch(self) -> None:
        """Until cancelled: asks for a turn again and again."""
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest_s, last = max(self.longest_s, now - last), now


@asynccontextmanager
async def loop_stalls() -> AsyncIterator[LoopStalls]:
    """Watches while it is entered."""
    gc.collect()
    stalls = LoopStalls()
    task = asyncio.create_task(stalls.watch())
    await asyncio.sleep(0)
    yield stalls
    task.cancel()


async def least_stall(work: Callable[[int], Awaitable[None]], enough_s: float) -> float:
    """The shortest of the longest stalls of up to five runs of `work`, which is given their number; no more once one is
    as short as `enough_s`. On a core that other processes use the same work takes longer."""
    best_s = float("inf")
    for number in range(5):
        async with loop_stalls() as stalls:
            await work(number)
        if (best_s := min(best_s, stalls.longest_s)) <= enough_s:
            break
    return best_s
