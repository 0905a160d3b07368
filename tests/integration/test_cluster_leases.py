"""Real processes whose clients leave at any moment: no read lease is left behind, and none has to expire for that."""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest
from support.cluster import ClusterHandle, cluster

pytestmark = pytest.mark.slow

STREAMS, AT_ONCE = 300, 25
LEFT_S = 60.0
"""They would last for ten minutes."""
OVERRIDES = (
    "engine.inter_token_s=0.01",
    "engine.prefill_tokens_per_s=4000",
    "store.read_lease_s=600",
    "store.reserve_ttl_s=600",
)


async def ask_and_leave(subject: ClusterHandle, draw: random.Random, prefixes: list[list[int]]) -> None:
    """A stream whose client goes away after a while, whatever is under way then, or at one of its first tokens."""
    prompt = draw.choice(prefixes) + [draw.randrange(1, 50_000) for _ in range(draw.randrange(200))]
    fields = {"max_tokens": 50, "temperature": 0, "ignore_eos": True}

    after_s, events = draw.choice([0.03, 0.1, 0.2, 0.4, None, None]), draw.randrange(1, 20)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(None if after_s is None else after_s * draw.uniform(0.5, 1.0)):
            async with contextlib.aclosing(
                subject.events("/v1/completions", subject._completion(prompt, fields))
            ) as read:
                async for _ in read:
                    events -= after_s is None
                    if not events:
                        break


async def test_three_hundred_cancelled_streams_leave_no_lease(tmp_path: Path) -> None:
    draw = random.Random(13)
    prefixes = [[draw.randrange(1, 50_000) for _ in range(length)] for length in (64, 200, 500, 1000)]
    async with cluster(tmp_path, overrides=OVERRIDES) as subject:
        for prefix in prefixes:
            await subject.complete(prefix, max_tokens=2)
        before = (await subject.stats()).counters
        gate = asyncio.Semaphore(AT_ONCE)

        async def one() -> None:
            async with gate:
                await ask_and_leave(subject, draw, prefixes)

        await asyncio.gather(*(one() for _ in range(STREAMS)))
        assert (await subject.status())["requests"]["cancelled"] > STREAMS // 4

        async def idle() -> bool:
            reports = [(await subject.node_info(name)).stats for name in subject.nodes]
            return all(stats is not None and not (stats.running or stats.waiting or stats.loading) for stats in reports)

        await subject.until(idle, 60)

        async def none_left() -> bool:
            return (await subject.stats()).read_leases == 0

        await subject.until(none_left, LEFT_S)
        after = (await subject.stats()).counters
        assert after.get("leases_expired", 0) == 0, "they would have lasted ten minutes"
        assert after["hits"] > before["hits"], "they did read"
