"""What a router remembers levels off, in virtual time: behind its rings and traces nothing grows with the requests."""

import asyncio
import gc
import tracemalloc
from collections.abc import Callable

import pytest
from support.sim_caches import CachingMachine, TraceLoad
from support.sim_load import Flow
from support.sim_loop import LoopClock, run_sim

from router.cache.limits import WatchLimits
from router.cache.watch import CacheWatch
from router.requests import records

SMALL = WatchLimits(known_prefixes=1 << 10, known_runs=1 << 10, trace_bytes=1 << 16, trace_s=5.0, tokens_per_s=1e9)
BY_TESTS = tracemalloc.Filter(False, "*/tests/*")
REQUESTS = 300
"""Between two looks."""


def prompt_of(number: int) -> list[int]:
    """The first chunk is one of 300."""
    return [number % 300 + 1] * 256 + [1 + number // 8 % 500] * 40 + [1 + number % 8] * 10


def grown(prepare: Callable[[TraceLoad], None] = lambda _load: None) -> float:
    """Bytes that the router holds more for each request, once its rings are full."""

    async def main() -> float:
        machine = CachingMachine(1, 2, engine_tokens=8192, segment_tokens=16_384)
        load = TraceLoad(machine, router={"first_token_s": None})
        CacheWatch(load.cluster, load.log, LoopClock(asyncio.get_running_loop()), limits=SMALL)
        prepare(load)
        await load.prober.probe()
        asked = 0

        async def ask(count: int) -> int:
            nonlocal asked
            for first in range(asked, asked + count, 10):
                seen = [load.send(Flow(0, max_tokens=2), prompt_of(number)) for number in range(first, first + 10)]
                assert not [one.error for one in await asyncio.gather(*seen) if one.error is not None]
            asked += count
            load.seen.clear()
            load.records.clear()
            gc.collect()
            return sum(one.size for one in tracemalloc.take_snapshot().filter_traces([BY_TESTS]).traces)

        await ask(400)
        before = await ask(100)
        return (await ask(REQUESTS) - before) / REQUESTS

    tracemalloc.start(1)
    try:
        return run_sim(main, limit_s=1e6)
    finally:
        tracemalloc.stop()


@pytest.fixture(autouse=True)
def _short_ring(monkeypatch):
    monkeypatch.setattr(records, "RING", 100)


@pytest.mark.slow
def test_a_router_holds_no_more_after_many_requests_than_after_few():
    assert grown() < 50, "bytes a request"


@pytest.mark.slow
def test_what_is_kept_of_each_request_would_be_found():
    kept: list[object] = []
    assert grown(lambda load: load.log.observers.append(lambda record: kept.append(record.legs))) > 200
