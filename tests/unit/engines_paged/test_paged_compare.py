"""What a prompt's reuse costs, and which chunk is to blame: one engine computes it both ways."""

import asyncio
import math

import msgspec
import numpy as np
import pytest
from support.engine_fakes import CHUNK, CONFIG, alone, completions, idle, prompt_of, request

from engines.paged.compare import divergence, gap
from engines.sim.reference import expected_tokens
from kvcore.errors import OverloadedError
from nodeapi.documents import CompareRequest, Documents

PROMPT = prompt_of(5 * CHUNK + 9)
SLOW = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=CHUNK, max_batch_tokens=CHUNK)  # a chunk a second


def asked(prompt=PROMPT, **fields):
    return CompareRequest(request_id="c", prompt_token_ids=prompt, num_tokens=6, deadline_s=100.0, **fields)


def damage(engine, chunk):
    """Flip a bit of a cached chunk in the engine's memory. Blocks are given out in their order."""
    size, per_chunk = CONFIG.block_size * CONFIG.bytes_per_token, CHUNK // CONFIG.block_size
    engine._runner.memory[chunk * per_chunk * size + 77] ^= 1


@pytest.mark.parametrize(("full", "other"), [([-0.1, -2.3], [math.nan, -2.3]), ([math.nan, -2.3], [-0.1, -2.3])])
def test_a_distribution_that_has_what_is_no_number_is_as_far_off_as_can_be(full, other):
    """It was told as no divergence at all: the greater of 0 and what is no number is 0."""
    pair = np.array(full, np.float32), np.array(other, np.float32)
    assert divergence(*pair) == gap(*pair) == math.inf


def test_what_is_cached_is_what_would_be_computed():
    async def act(engine):
        await completions(engine, request("r", PROMPT))
        reply = await engine.compare(asked())
        [[*tokens]] = expected_tokens(CONFIG, PROMPT, request("r", PROMPT, max_tokens=6).sampling)
        assert reply.token_ids == tokens
        assert (reply.kl, reply.gaps, reply.agreement) == ([0.0] * 6, [0.0] * 6, 1.0)
        assert (reply.cached_tokens, reply.computed_tokens) == (5 * CHUNK, 9)
        assert reply.distances == [0.0] * 5
        assert reply.full_s > reply.reused_s

    alone(act)


def test_a_damaged_chunk_is_named_and_dropped_and_what_is_right_stays():
    async def act(engine):
        await completions(engine, request("r", PROMPT))
        damage(engine, 2)
        wrong = await completions(engine, request("wrong", PROMPT))
        reply = await engine.compare(asked(max_distance=0.5))
        assert reply.distances == [0.0, 0.0, 1.0, 0.0, 0.0]
        assert min(reply.kl) > 0.1 and reply.agreement < 1.0
        again = await engine.compare(asked())
        assert (again.agreement, again.cached_tokens) == (1.0, 2 * CHUNK)
        right = expected_tokens(CONFIG, PROMPT, request("r", PROMPT).sampling)
        assert await completions(engine, request("right", PROMPT)) == right != wrong

    alone(act)


def test_without_a_limit_nothing_is_dropped():
    async def act(engine):
        await completions(engine, request("r", PROMPT))
        damage(engine, 2)
        assert [(await engine.compare(asked())).distances[2] for _ in range(2)] == [1.0, 1.0]

    alone(act)


def test_documents_are_compared_and_no_chunk_is_blamed():
    prompt, said = PROMPT + PROMPT[:70], Documents(header=10, spans=[(40, 100), (100, 160)], k=4)

    async def act(engine):
        reply = await engine.compare(asked(prompt, documents=said))
        assert (reply.approximate_tokens, reply.distances) == (112, [])
        assert min(reply.kl) > 0.1, "in a simulated model what is approximate is another text"
        whole = msgspec.structs.replace(said, k=60)
        assert (await engine.compare(asked(prompt, documents=whole))).agreement == 1.0

    alone(act)


def test_a_busy_engine_compares_nothing_and_what_comes_meanwhile_goes_first():
    async def act(engine):
        comparing = asyncio.ensure_future(engine.compare(asked()))
        await asyncio.sleep(0.5)
        with pytest.raises(OverloadedError, match="idle"):
            await engine.compare(asked())
        began = asyncio.get_running_loop().time()
        await completions(engine, request("first", prompt_of(2 * CHUNK, 7), max_tokens=1))
        assert asyncio.get_running_loop().time() - began < 3.6, "the step under way, and its own two"
        assert not comparing.done()
        assert (await comparing).agreement == 1.0

    alone(act, SLOW)


def test_one_that_is_given_up_holds_nothing():
    async def act(engine):
        for after in (0.5, 3.5, 8.5, 12.2):  # in its full way and in the other one
            comparing = asyncio.ensure_future(engine.compare(asked(prompt_of(5 * CHUNK + 9, int(after)))))
            await asyncio.sleep(after)
            comparing.cancel()
            await asyncio.wait([comparing])
            await idle(engine)

    alone(act, SLOW)


def test_an_engine_without_room_for_both_ways_compares_without_distances():
    config = msgspec.structs.replace(CONFIG, num_blocks=30)

    async def act(engine):
        await completions(engine, request("r", PROMPT))
        reply = await engine.compare(asked())
        assert (reply.agreement, reply.distances) == (1.0, [])

    alone(act, config)


@pytest.mark.parametrize("documents", [None, Documents(header=10, spans=[(40, 100), (100, 160)], k=4)])
def test_a_request_that_needs_the_blocks_of_a_comparison_gets_them(documents):
    """It held on to them until its own deadline, and nobody behind it was computed."""
    config = msgspec.structs.replace(SLOW, num_blocks=16 * CHUNK // CONFIG.block_size)

    async def act(engine):
        comparing = asyncio.create_task(engine.compare(asked(prompt_of(7 * CHUNK + 3), documents=documents)))
        await asyncio.sleep(8.5)  # in virtual time: the prompt is computed in full, and its reuse has begun
        assert not comparing.done()
        answers = await asyncio.wait_for(completions(engine, request("big", prompt_of(12 * CHUNK, 3))), 40)
        assert answers == expected_tokens(config, prompt_of(12 * CHUNK, 3), request("big", PROMPT).sampling)
        assert len((await comparing).kl) == 6

    alone(act, config)


def test_two_comparisons_at_a_time_are_one_too_many_whatever_the_first_is_doing():
    """While it tells distances it has no leg. The second one's blocks were lost with the first one's end."""

    async def act(engine):
        await completions(engine, request("r", PROMPT))
        began, goes_on, distance = asyncio.Event(), asyncio.Event(), engine._runner.distance

        async def late(*blocks):
            began.set()
            await goes_on.wait()
            return await distance(*blocks)

        engine._runner.distance = late
        first = asyncio.create_task(engine.compare(asked()))
        await began.wait()
        with pytest.raises(OverloadedError):
            await engine.compare(asked())
        goes_on.set()
        assert (await first).distances == [0.0] * 5
        assert (await engine.compare(asked())).distances == [0.0] * 5

    alone(act)
