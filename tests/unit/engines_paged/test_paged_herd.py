"""Prompts that begin alike and come at once are computed once by an engine, whoever of them leaves."""

import asyncio
from contextlib import suppress

import msgspec
import pytest
from support.engine_fakes import CHUNK, CONFIG, completions, idle, lone_engine, prompt_of, request
from support.sim_loop import run_sim

from engines.paged.blocks import BlockManager
from engines.paged.scheduler import Scheduler
from engines.paged.sequence import Status, TokenSequence
from engines.sim.reference import expected_tokens
from kvcore.chunk_keys import KeyChain, root_key
from nodeapi.sampling import SamplingParams

SLOW = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=CHUNK, max_batch_tokens=CHUNK)  # a chunk a second
LENGTH = 6 * CHUNK + 5
PROMPT = prompt_of(LENGTH)


def in_engine(act, config=SLOW):
    async def main():
        async with lone_engine(config) as engine:
            await act(engine)
            return (await idle(engine)).counters

    return run_sim(main, limit_s=200)


def right(prompt, name, **sampling):
    wanted = request(name, prompt, **sampling)
    return expected_tokens(CONFIG, prompt, wanted.sampling)


async def herd(engine, prompts, **sampling):
    """All at once; each is answered right."""
    requests = [request(f"r{i}", prompt, **sampling) for i, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*(completions(engine, wanted) for wanted in requests))
    assert answers == [right(p, f"r{i}", **sampling) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("n", [1, 3])
def test_one_prompt_many_times_is_computed_once(count, n):
    counters = in_engine(lambda engine: herd(engine, [PROMPT] * count, n=n))
    tail = LENGTH % CHUNK  # no full chunk: each computes it
    assert counters["prefill_tokens"] + 1 == 6 * CHUNK + tail + (count - 1) * (tail - 1)
    assert counters["cached_tokens"] == (count - 1) * 6 * CHUNK


def test_behind_what_they_share_each_computes_its_own():
    tails = [prompt_of(2 * CHUNK, seed) for seed in range(1, 5)]
    counters = in_engine(lambda engine: herd(engine, [PROMPT[: 3 * CHUNK] + tail for tail in tails]))
    assert counters["prefill_tokens"] == 3 * CHUNK + 4 * (2 * CHUNK - 1)


def test_with_salts_nothing_is_shared():
    async def act(engine):
        requests = [msgspec.structs.replace(request(f"r{i}", PROMPT), cache_salt=b"%d" % i) for i in range(3)]
        answers = await asyncio.gather(*(completions(engine, wanted) for wanted in requests))
        assert answers == [right(PROMPT, "r")] * 3

    assert in_engine(act)["prefill_tokens"] == 3 * (LENGTH - 1)


@pytest.mark.parametrize("after_s", [0.5, 2.5, 5.5])
def test_when_the_computing_one_leaves_another_goes_on_from_there(after_s):
    async def act(engine):
        first = asyncio.create_task(completions(engine, request("first", PROMPT)))
        await asyncio.sleep(0.01)
        others = asyncio.create_task(herd(engine, [PROMPT] * 4))
        await asyncio.sleep(after_s)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        began = asyncio.get_running_loop().time()
        await others
        assert asyncio.get_running_loop().time() - began < 7.0 - int(after_s) + 1.0, "no full chunk is computed again"

    in_engine(act)


def test_followers_keep_no_other_prompt_from_the_engine():
    config = msgspec.structs.replace(SLOW, max_sequences=2, num_blocks=64)

    async def act(engine):
        crowd = asyncio.create_task(herd(engine, [PROMPT] * 6))
        await asyncio.sleep(0.1)
        own = prompt_of(CHUNK, 9)
        assert await completions(engine, request("own", own, max_tokens=1)) == right(own, "own", max_tokens=1)
        assert not crowd.done()
        await crowd

    in_engine(act, config)


def test_nobody_follows_a_paused_prompt():
    blocks = BlockManager(32, 4, 2)
    scheduler = Scheduler(blocks, max_batch_tokens=8, max_sequences=4, max_waiting=4)
    leader, follower = (
        TokenSequence(
            request_id=str(number),
            age=(number, 0),
            tokens=[5] * 33,
            num_prompt=33,
            chain=KeyChain(root_key(bytes(16))),
            chunk_tokens=8,
            sampling=SamplingParams(max_tokens=9),
        )
        for number in (1, 2)
    )
    scheduler.add(leader)
    scheduler.add(follower)
    scheduler.complete(scheduler.schedule())
    assert (leader.num_computed, follower.status, follower.block_table) == (8, Status.WAITING, [])
    leader.paused = True
    scheduler.complete(scheduler.schedule())
    assert (leader.num_computed, follower.num_computed) == (8, 16), "it took what there was, and went on"
