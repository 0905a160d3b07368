"""The loop over the simulated runner answers what the tokens alone say, whatever the schedule."""

import asyncio

import msgspec
import pytest
from support.engine_fakes import (
    CHUNK,
    CONFIG,
    Cluster,
    completions,
    deltas,
    idle,
    lone_engine,
    prefill_request,
    prompt_of,
    request,
)
from support.sim_loop import run_sim

from engines.sim.arithmetic import Arithmetic
from engines.sim.reference import expected_tokens
from engines.sim.runner import SimRunner
from kvcore.chunk_keys import owner_of
from kvcore.errors import ContextLengthError, InvalidRequestError
from kvstore.reader import ChunkReader
from nodeapi.messages import FinishReason

LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, CONFIG.max_context - 5]


def check(requests, config=CONFIG, seed=None, stagger_s=0.0):
    async def main():
        async with lone_engine(config) as engine:

            async def one(number, wanted):
                await asyncio.sleep(number * stagger_s)
                return await completions(engine, wanted)

            got = await asyncio.gather(*(one(number, wanted) for number, wanted in enumerate(requests)))
            stats = await idle(engine)
            return got, stats

    got, stats = run_sim(main, seed=seed, limit_s=1000)
    for wanted, tokens in zip(requests, got, strict=True):
        expected = expected_tokens(config, wanted.prompt_token_ids, wanted.sampling, output=wanted.output_token_ids)
        assert tokens == expected, wanted.request_id
    return got, stats


@pytest.mark.parametrize("length", LENGTHS)
def test_one_request_of_each_length(length):
    (got,), _ = check([request("r", prompt_of(length))])
    assert len(got[0]) == min(20, CONFIG.max_context - length)


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("stagger_s", [0.0, 0.013])
def test_a_batch_of_all_lengths(seed, stagger_s):
    check([request(f"{k}/{n}", prompt_of(n, n + k)) for n in LENGTHS for k in range(2)], seed=seed, stagger_s=stagger_s)


def test_steps_of_few_tokens():
    check([request(f"r{n}", prompt_of(n, n)) for n in LENGTHS], msgspec.structs.replace(CONFIG, max_batch_tokens=50))


@pytest.mark.parametrize("length", [1, 8, 33, 70])
def test_three_completions_share_one_prompt(length):
    (got,), stats = check([request("r", prompt_of(length), n=3, temperature=1.0, seed=7)])
    assert len({tuple(tokens) for tokens in got}) == 3
    assert stats.counters["prefill_tokens"] - 3 * 19 <= length


def test_preemption_in_a_tiny_pool_changes_nothing():
    config = msgspec.structs.replace(CONFIG, num_blocks=16)
    requests = [request(f"r{n}", prompt_of(30 + n, n), max_tokens=50, n=1 + n % 3, temperature=1.0) for n in range(9)]
    _, stats = check(requests, config, seed=3)
    assert stats.counters["preemptions"] > 0


def test_more_completions_than_may_run():
    config = msgspec.structs.replace(CONFIG, max_sequences=2)
    check([request("r", prompt_of(40), n=5, temperature=1.0)], config)


def test_stop_token_ends_but_not_before_min_tokens():
    plain = expected_tokens(CONFIG, prompt_of(10), request("r", prompt_of(10)).sampling)[0]
    stop = plain[4]

    async def main():
        async with lone_engine() as engine:
            return (
                await deltas(engine, request("a", prompt_of(10), stop_token_ids=[stop])),
                await deltas(
                    engine, request("b", prompt_of(10), stop_token_ids=[stop], min_tokens=plain.index(stop) + 1)
                ),
            )

    stopped, later = run_sim(main)
    assert [d.token_ids[0] for d in stopped] == plain[: plain.index(stop) + 1]
    assert (stopped[-1].finish_reason, stopped[-1].stop_token_id) == (FinishReason.STOP, stop)
    assert len(later) > len(stopped)


def test_eos_ends_unless_ignored():
    config = msgspec.structs.replace(CONFIG, vocab_size=8)
    wanted = [request(f"r{n}", prompt_of(9, n, config), ignore_eos=False, max_tokens=100) for n in range(8)]
    got, _ = check(wanted, config)
    assert all(tokens[0][-1] == 0 for tokens in got)


@pytest.mark.parametrize("done", [1, 5, 19, 20])
def test_a_continued_request_goes_on_where_it_was(done):
    whole = expected_tokens(CONFIG, prompt_of(50), request("r", prompt_of(50), temperature=0.5, seed=9).sampling)[0]
    (got,), _ = check([request("r", prompt_of(50), output=whole[:done], temperature=0.5, seed=9)])
    assert got[0] == whole


def test_memory_bounds_the_context_too():
    config = msgspec.structs.replace(CONFIG, num_blocks=8)  # 64 tokens

    async def main():
        async with lone_engine(config) as engine:
            last = (await deltas(engine, request("r", prompt_of(60), max_tokens=50)))[-1]
            with pytest.raises(ContextLengthError, match="64"):
                await deltas(engine, request("s", prompt_of(65)))
            with pytest.raises(ContextLengthError):
                await engine.prefill(prefill_request("t", prompt_of(65)))
            return last.finish_reason

    assert run_sim(main) is FinishReason.LENGTH


@pytest.mark.parametrize("prompt", [[], [-1], [CONFIG.vocab_size]])
def test_bad_prompts_are_refused_before_they_reach_the_model(prompt):
    async def main():
        async with lone_engine() as engine:
            with pytest.raises(InvalidRequestError):
                await deltas(engine, request("r", prompt))

    run_sim(main)


def test_logprobs_come_when_asked_for():
    async def main():
        async with lone_engine() as engine:
            return await deltas(engine, request("r", prompt_of(9), logprobs=2))

    for delta in run_sim(main):
        (entry,) = delta.logprobs
        assert entry.top[0] == (delta.token_ids[0], entry.logprob) and len(entry.top) == 2


def test_a_requests_chunks_are_read_as_its_tenants(monkeypatch):
    told, read = [], ChunkReader.read

    async def reading(reader, match, start, buffers, timeout_s, *, owner):
        told.append(owner)
        return await read(reader, match, start, buffers, timeout_s, owner=owner)

    monkeypatch.setattr(ChunkReader, "read", reading)

    async def main():
        cluster = Cluster()
        async with cluster.engine("a") as one, cluster.engine("b") as other:
            await one.prefill(msgspec.structs.replace(prefill_request("p", prompt_of(100)), cache_salt=b"tenant"))
            await idle(one)
            wanted = msgspec.structs.replace(request("g", prompt_of(100)), cache_salt=b"tenant")
            return (await deltas(other, wanted))[0].info.cached_tokens

    assert run_sim(main) == 96 and told == [owner_of(b"tenant")]


def test_the_second_request_reuses_whole_chunks_and_says_so():
    async def main():
        async with lone_engine() as engine:
            await completions(engine, request("a", prompt_of(100)))
            second = await deltas(engine, request("b", prompt_of(100)))
            other = msgspec.structs.replace(request("c", prompt_of(100)), cache_salt=b"tenant")
            return second[0].info, (await deltas(engine, other))[0].info

    same, salted = run_sim(main)
    assert (same.cached_tokens, same.computed_tokens) == (96, 4)
    assert (salted.cached_tokens, salted.computed_tokens) == (0, 100)


def test_a_prefill_leg_keeps_to_its_tenants_chunks_too():
    async def main():
        async with lone_engine() as engine:
            salts = (b"a", b"b", b"", b"a")
            legs = [
                msgspec.structs.replace(prefill_request(str(n), prompt_of(100)), cache_salt=salt)
                for n, salt in enumerate(salts)
            ]
            return [(await engine.prefill(leg)).cached_tokens for leg in legs]

    first, other, nobodys, again = run_sim(main)
    assert (first, other, nobodys) == (0, 0, 0) and again > 0


def test_other_weights_give_other_tokens():
    other = msgspec.structs.replace(CONFIG, weights_version="v2")
    sampling = request("r", prompt_of(9)).sampling
    assert expected_tokens(CONFIG, prompt_of(9), sampling) != expected_tokens(other, prompt_of(9), sampling)
    specs = [SimRunner(config, "m", CHUNK).info.kv_spec for config in (CONFIG, other)]
    assert specs[0].fingerprint != specs[1].fingerprint


def test_records_must_be_whole_digests():
    with pytest.raises(ValueError, match="16"):
        Arithmetic("v", 24, 10)
