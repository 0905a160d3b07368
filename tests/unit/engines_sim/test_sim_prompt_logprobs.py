"""Logprobs of a prompt's tokens: those that the tokens alone say, whatever was cached and however it was computed."""

import asyncio
from collections.abc import Sequence

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
    prompt_of,
    request,
)
from support.sim_loop import run_sim

from engines.sim.reference import expected_prompt_rows, expected_tokens
from nodeapi.messages import TokenDelta
from nodeapi.prompt_logprobs import MOST_ENTRIES, PromptRow


def rows_of(told: Sequence[TokenDelta]) -> list[PromptRow]:
    """Those of all deltas; each begins where the one before ended, and none comes behind a token."""
    pieces = [delta.prompt_logprobs for delta in told if delta.prompt_logprobs is not None]
    assert all(delta.prompt_logprobs is not None for delta in told[: len(pieces)]), "they come before all tokens"
    assert all(not delta.token_ids and delta.index == 0 for delta in told[: len(pieces)])
    start = 1
    for piece in pieces:
        assert piece.start == start and len(piece) * (1 + piece.top) <= MOST_ENTRIES
        start = piece.end
    return [row for piece in pieces for row in piece.rows()]


@pytest.mark.parametrize("length", [1, 2, CHUNK, CHUNK + 1, 3 * CHUNK + 7, 1000])
@pytest.mark.parametrize("top", [0, 5])
def test_each_token_but_the_first_has_its_own_and_the_likeliest(length: int, top: int) -> None:
    wanted = request("r", prompt_of(length), prompt_logprobs=top, max_tokens=3)

    async def main() -> list[TokenDelta]:
        async with lone_engine(msgspec.structs.replace(CONFIG, max_batch_tokens=50)) as engine:
            return await deltas(engine, wanted)

    told = run_sim(main)
    assert rows_of(told) == expected_prompt_rows(CONFIG, wanted.prompt_token_ids, top)
    assert [delta.info is not None for delta in told] == [True] + [False] * (len(told) - 1)
    tokens = [token for delta in told for token in delta.token_ids]
    assert [tokens] == expected_tokens(CONFIG, wanted.prompt_token_ids, wanted.sampling)


def test_a_cached_prefix_is_computed_again_for_them_and_stays_cached() -> None:
    prompt = prompt_of(5 * CHUNK + 3)

    async def main() -> None:
        cluster = Cluster()
        async with cluster.engine("a") as one, cluster.engine("b") as two:
            await completions(one, request("first", prompt))
            await idle(one)
            before = cluster.num_stored
            for engine in (one, two):  # one has the KV in its blocks, the other finds it in the store
                told = await deltas(engine, request("scored", prompt, prompt_logprobs=2))
                assert rows_of(told) == expected_prompt_rows(CONFIG, prompt, 2)
                assert told[0].info is not None
                assert (told[0].info.cached_tokens, told[0].info.computed_tokens) == (0, len(prompt))
                await idle(engine)
            assert cluster.num_stored >= before
            again = await deltas(two, request("later", prompt))
            assert again[0].info is not None and again[0].info.cached_tokens == 5 * CHUNK
        await cluster.aclose()

    run_sim(main)


def test_what_they_made_be_computed_is_stored_for_others() -> None:
    prompt = prompt_of(5 * CHUNK + 3)

    async def main() -> None:
        cluster = Cluster()
        async with cluster.engine("a") as one, cluster.engine("b") as two:
            await completions(one, request("scored", prompt, prompt_logprobs=0))
            await idle(one)
            told = await deltas(two, request("later", prompt))
            assert told[0].info is not None and told[0].info.cached_tokens == 5 * CHUNK
        await cluster.aclose()

    run_sim(main)


def test_preemptions_and_several_completions_neither_lose_nor_repeat_one() -> None:
    config = msgspec.structs.replace(CONFIG, num_blocks=16, max_batch_tokens=13)
    prompts = [prompt_of(30 + n, n) for n in range(9)]

    async def main() -> tuple[list[list[TokenDelta]], int]:
        async with lone_engine(config) as engine:
            requests = [
                request(f"r{n}", prompt, max_tokens=50, n=1 + n % 3, temperature=1.0, prompt_logprobs=n % 2)
                for n, prompt in enumerate(prompts)
            ]
            told = await asyncio.gather(*(deltas(engine, wanted) for wanted in requests))
            return list(told), (await idle(engine)).counters["preemptions"]

    told, preemptions = run_sim(main, seed=3)
    assert preemptions > 0
    for n, prompt in enumerate(prompts):
        assert rows_of(told[n]) == expected_prompt_rows(config, prompt, n % 2)


def test_listed_tokens_are_told_in_their_order_beside_each_sampled_one() -> None:
    wanted = request("r", prompt_of(40), logprobs=0, logprob_token_ids=[7, 3, 7, 11], max_tokens=3)

    async def main() -> list[TokenDelta]:
        async with lone_engine() as engine:
            return await deltas(engine, wanted)

    for delta in run_sim(main):
        assert delta.logprobs is not None
        assert [token for token, _ in delta.logprobs[0].top] == [7, 3, 7, 11]
