"""The guard around a tier: breaker, bytes under way, measured rates, deadlines that the tier itself does not keep."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from support.sim_loop import run_sim
from support.tier_rigs import FINGERPRINT, chunk_of, name_of, room_for

from kvcore.clock import Clock, ManualClock
from kvstore.tiers.base import Cleared, TierChunk, TierOutcome
from kvstore.tiers.disk import open_disk
from kvstore.tiers.guarded import GuardedTier
from kvstore.tiers.limits import TierLimits
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.rate import RunningRate

OK, AWAY = TierOutcome.OK, TierOutcome.UNAVAILABLE
MIB = 1 << 20


class LoopClock:
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return self.now()


class Server:
    """What a memory tier asks first. It counts calls, and how many bytes could be under way."""

    def __init__(self) -> None:
        self.up, self.delay_s, self.calls, self.now, self.most = True, 0.0, 0, 0, 0

    async def __call__(self, timeout_s: float) -> bool:
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.now -= 1
        return self.up


def guarded(server: Server, in_flight_bytes: int = MIB, clock: Clock | None = None) -> GuardedTier:
    clock = clock or LoopClock()
    return GuardedTier(MemoryTier(64 * MIB, clock, before=server), clock, in_flight_bytes=in_flight_bytes)


def test_a_dead_tier_costs_three_calls_and_then_nothing_for_a_while():
    async def main():
        server = Server()
        tier, chunk = guarded(server), chunk_of(name_of(1), 1000)
        assert await tier.save([chunk], timeout_s=1) == [OK]
        server.up, server.calls = False, 0
        for _ in range(50):
            assert await tier.load([room_for(chunk)], timeout_s=1) == [AWAY]
            assert not tier.away or await tier.find([chunk.name], timeout_s=1) == [False]
        assert server.calls == TierLimits().failures and tier.away and "left alone" in str(tier.stats().problem)
        server.up = True
        await asyncio.sleep(TierLimits().longest_pause_s)
        assert await tier.load([room_for(chunk)], timeout_s=1) == [OK] and not tier.away
        assert tier.stats().problem is None
        assert tier.counts["load", AWAY] == 50 and tier.counts["load", OK] == 1

    run_sim(main)


def test_pauses_double_up_to_a_bound_and_one_call_tries():
    async def main():
        server, limits = Server(), TierLimits()
        tier, chunk = guarded(server), chunk_of(name_of(1), 1000)
        server.up, server.delay_s = False, 0.1
        loop = asyncio.get_running_loop()
        tries = []
        while loop.time() < 30:
            before = server.calls
            await asyncio.gather(*(tier.load([room_for(chunk)], timeout_s=1) for _ in range(3)))
            if server.calls > before and len(tries) >= 1:
                assert server.calls == before + 1, "one call tries, the others do not wait for it"
            if server.calls > before:
                tries.append(loop.time())
            await asyncio.sleep(0.01)
        gaps = [after - before for before, after in pairwise(tries)]
        assert gaps[0] < gaps[1] < gaps[2] and max(gaps) < limits.longest_pause_s + 0.3

    run_sim(main)


def test_a_tier_that_hangs_is_left_at_the_deadline():
    async def main():
        server = Server()
        tier, chunk = guarded(server), chunk_of(name_of(1), 1000)
        server.delay_s = 1000
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await tier.load([room_for(chunk)], timeout_s=0.5) == [AWAY]
        assert await tier.find([chunk.name], timeout_s=0.5) == [False]
        await tier.remove([chunk.name], timeout_s=0.5)
        assert loop.time() - began < 1.6

    run_sim(main)


def test_no_more_bytes_are_under_way_than_agreed_and_a_large_one_goes_alone():
    async def main():
        server = Server()
        tier = guarded(server, in_flight_bytes=3000)
        server.delay_s = 0.1
        small = [chunk_of(name_of(number), 1000) for number in range(20)]
        assert await asyncio.gather(*(tier.save([one], timeout_s=60) for one in small)) == [[OK]] * 20
        assert server.most == 2
        server.most = 0
        large = [chunk_of(name_of(100 + number), 9000) for number in range(3)]
        assert await asyncio.gather(*(tier.save([one], timeout_s=60) for one in large)) == [[OK]] * 3
        assert server.most == 1
        late = await asyncio.gather(*(tier.save([chunk_of(name_of(1), 1000)], timeout_s=0.15) for _ in range(20)))
        assert late.count([OK]) >= 2 and late.count([AWAY]) >= 10

    run_sim(main)


def test_what_took_long_counts_more_in_a_rate_than_what_was_short():
    rate = RunningRate(weight=0.2)
    rate.observe(0, 1.0)
    assert rate.value is None
    rate.observe(1, 0.03)
    assert rate.value == pytest.approx(1 / 0.03)
    rate.observe(2000, 8.0)
    assert 0.95 * 250 < (rate.value or 0) <= 250, "one token of a prompt that is cached says little"
    for _ in range(40):
        rate.observe(100, 1.0)
    assert rate.value == pytest.approx(100, rel=0.02)


def test_what_is_tried_again_counts_half_if_it_is_faster():
    rate = RunningRate(weight=0.2)
    for _ in range(20):
        rate.observe(100, 100.0)
    rate.observe(100, 0.1)
    assert rate.value == pytest.approx(1.25, rel=0.01), "an accident that nobody looked for"
    rate.doubt()
    rate.observe(100, 0.1)
    assert rate.value == pytest.approx(500, rel=0.01)
    rate.doubt()
    rate.observe(100, 100.0)
    rate.observe(100, 100.0)
    assert rate.value < 5, "one that is slow counts as ever"


def test_rates_and_bytes_are_measured():
    async def main():
        server = Server()
        tier, chunk = guarded(server), chunk_of(name_of(1), 100_000 - 128)
        assert tier.rate("load") is None
        server.delay_s = 0.1
        await tier.save([chunk], timeout_s=1)
        for _ in range(20):
            await tier.load([room_for(chunk)], timeout_s=1)
        assert 0.9e6 < (tier.rate("load") or 0) < 1.1e6 and tier.moved_bytes["load"] == 20 * 100_000
        await tier.load([room_for(chunk_of(name_of(2), 1000))], timeout_s=1)
        assert tier.moved_bytes["load"] == 20 * 100_000, "what is missing is not measured"

    run_sim(main)


def test_a_call_that_is_cut_or_given_up_tells_how_slow_the_tier_is_at_least():
    """Else what is too slow to be measured is believed to be as fast as it was for ever."""

    async def main():
        server = Server()
        tier, chunk = guarded(server), chunk_of(name_of(1), 100_000 - 128)
        server.delay_s = 0.1
        await tier.save([chunk], timeout_s=1)
        assert await tier.load([room_for(chunk)], timeout_s=1) == [OK] and (tier.rate("load") or 0) > 0.9e6
        server.delay_s = 100
        given_up = asyncio.create_task(tier.load([room_for(chunk)], timeout_s=50))
        await asyncio.sleep(10)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert (tier.rate("load") or 0) < 60_000
        for _ in range(2):
            assert await tier.load([room_for(chunk)], timeout_s=20) == [AWAY]
        slow = tier.rate("load") or 0
        assert slow < 15_000
        server.delay_s = 0.1
        assert await tier.load([room_for(chunk)], timeout_s=0.05) == [AWAY]
        assert tier.rate("load") == slow, "that it takes longer than that was known"

        cut = guarded(server)
        server.delay_s = 100
        assert await cut.load([room_for(chunk)], timeout_s=5) == [AWAY]
        assert cut.rate("load") == pytest.approx(20_000), "nothing else is known of it"
        refusing = guarded(server)
        server.delay_s, server.up = 0.0, False
        assert await refusing.load([room_for(chunk)], timeout_s=5) == [AWAY]
        assert refusing.rate("load") is None

    run_sim(main)


def test_a_cancelled_try_leaves_the_breaker_able_to_try_again():
    async def main():
        server = Server()
        tier, chunk = guarded(server), chunk_of(name_of(1), 1000)
        server.up = False
        for _ in range(3):
            await tier.load([room_for(chunk)], timeout_s=1)
        await asyncio.sleep(5)
        server.up, server.delay_s = True, 10
        task = asyncio.create_task(tier.load([room_for(chunk)], timeout_s=100))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.delay_s = 0
        assert await tier.save([chunk], timeout_s=1) == [OK] and not tier.away

    run_sim(main)


def test_generations_pass_through_and_a_tier_that_is_away_is_not_asked():
    async def main():
        server = Server()
        tier, chunk = guarded(server), chunk_of(name_of(1), 1000)
        assert await tier.save([chunk], timeout_s=1) == [OK]
        await tier.mark(FINGERPRINT, "ours/d0", "a note", ttl_s=9, timeout_s=1)
        listed = await tier.generations(timeout_s=1)
        assert listed is not None and [(one.num_chunks, one.note) for one in listed.found] == [(1, "a note")]
        assert await tier.expire([chunk.name], 5.0, timeout_s=1) == 1
        assert await tier.clear([FINGERPRINT], own=[], timeout_s=1) == Cleared(0)
        assert await tier.clear([FINGERPRINT], timeout_s=1) == Cleared(1)
        server.delay_s = 100.0
        late = await tier.generations(timeout_s=1)
        assert late is not None and "in time" in late.incomplete
        assert "in time" in (await tier.clear([FINGERPRINT], timeout_s=1)).incomplete
        server.up, server.delay_s = False, 0.0
        while not tier.away:
            await tier.load([room_for(chunk)], timeout_s=1)
        calls = server.calls
        away = await tier.generations(timeout_s=1)
        assert away is not None and "left alone" in away.incomplete
        assert "left alone" in (await tier.clear([FINGERPRINT], timeout_s=1)).incomplete
        assert await tier.expire([chunk.name], 5.0, timeout_s=1) == 0
        await tier.mark(FINGERPRINT, "ours/d0", "", ttl_s=9, timeout_s=1)
        assert server.calls == calls

    run_sim(main)


async def test_a_disk_that_failed_is_in_use_again_after_a_pause_though_it_is_asked_first_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock, limits = ManualClock(), TierLimits()
    guard = GuardedTier(await open_disk(tmp_path / "x.slab", 4 * MIB, clock), clock, in_flight_bytes=MIB)
    chunk = chunk_of(name_of(1), 1000)
    assert await guard.save([chunk], timeout_s=20) == [OK]

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fails)
        for _ in range(limits.failures):
            assert await guard.load([room_for(chunk)], timeout_s=20) == [AWAY]
        assert guard.away
    clock.advance(limits.pause_s)
    assert await guard.find([chunk.name], timeout_s=20) == [True]
    assert await guard.load([room_for(chunk)], timeout_s=20) == [OK] and not guard.away
    assert guard.stats().problem is None
    await guard.aclose()


class Full(MemoryTier):
    """Takes nothing."""

    def stats(self):
        return replace(super().stats(), problem=self.problem)

    problem: str | None = None

    async def save(self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float):
        self.problem = "OOM"
        return [TierOutcome.FULL] * len(chunks)

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float):
        self.problem = None
        return await super().load(chunks, timeout_s=timeout_s)


async def test_that_it_takes_nothing_is_said_for_as_long_as_it_lasts_whatever_is_read_meanwhile():
    clock = ManualClock()
    tier = Full(MIB, clock)
    guard = GuardedTier(tier, clock, in_flight_bytes=MIB)
    chunk = chunk_of(name_of(1), 1000)
    assert await guard.save([chunk], timeout_s=1) == [TierOutcome.FULL]
    assert await guard.load([room_for(chunk)], timeout_s=1) == [TierOutcome.MISSING]
    assert tier.problem is None and guard.stats().problem == "OOM" and not guard.away
    tier.save = super(Full, tier).save
    assert await guard.save([chunk], timeout_s=1) == [OK] and guard.stats().problem is None
