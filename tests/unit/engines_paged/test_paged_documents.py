"""Documents of prompts in engines over a store: which tokens come out, what is moved, and what is never kept."""

import asyncio

import msgspec
import pytest
from support.documents import HEADER, TAIL, TEXTS, K, asked, expected, joined, prefill, slow_of
from support.engine_fakes import (
    CHUNK,
    CONFIG,
    FailingRunner,
    alone,
    completions,
    deltas,
    idle,
    in_cluster,
    lone_engine,
    prompt_of,
    request,
)
from support.sim_loop import LoopClock, run_sim

from engines.paged.loop import EngineLoop
from engines.paged.options import EngineOptions
from engines.sim.reference import expected_tokens
from kvcore.chunk_keys import prompt_keys
from kvcore.errors import CancelledByPeerError, DeadlineExceededError, NodeUnavailableError, OverloadedError
from nodeapi.documents import Documents


def test_the_tokens_are_those_of_documents_computed_behind_the_header_and_turned():
    async def act(engine):
        for order in ("abc", "cab", "bca", "ab", "b"):
            assert await completions(engine, asked(order)) == expected(order), order

    alone(act)
    plain = [expected_tokens(CONFIG, joined(order)[0], asked(order).sampling) for order in ("abc", "cab")]
    assert plain != [expected("abc"), expected("cab")], "else nothing was compared"


def test_what_was_reused_exactly_approximately_and_computed_is_told():
    prompt, _ = joined("ab")

    async def act(engine):
        first, second = [(await deltas(engine, asked(order)))[0].info for order in ("ab", "ba")]
        assert (first.cached_tokens, first.approximate_tokens) == (CHUNK + 77, 20 - K)
        assert first.computed_tokens == len(prompt) - (CHUNK + 77) - (20 - K)
        assert first.prepared_tokens >= 77 + 20
        assert (second.cached_tokens, second.approximate_tokens) == (CHUNK + 20, 77 - K)
        assert second.computed_tokens == len(prompt) - (CHUNK + 20) - (77 - K)
        assert second.prepared_tokens == 0
        counters = (await engine.stats()).counters
        assert counters["approximate_tokens"] == first.approximate_tokens + second.approximate_tokens

    alone(act)


def test_without_documents_the_tokens_are_as_ever_also_behind_reused_ones():
    """What was computed behind a reused document is found by nobody, its output included."""
    wanted = asked("cab", max_tokens=60)
    plain = msgspec.structs.replace(wanted, request_id="plain", documents=None)

    async def act(engine):
        [output] = await completions(engine, wanted)
        assert await completions(engine, plain) == expected_tokens(CONFIG, plain.prompt_token_ids, plain.sampling)
        longer = request("longer", wanted.prompt_token_ids + output + [5])
        stream = await deltas(engine, longer)
        [tokens] = expected_tokens(CONFIG, longer.prompt_token_ids, longer.sampling)
        assert [token for delta in stream for token in delta.token_ids] == tokens
        assert stream[0].info.cached_tokens <= len(wanted.prompt_token_ids)

    alone(act)


def test_one_node_has_the_documents_computed_and_another_reuses_them_in_another_order():
    async def act(cluster, prefiller, decoder):
        done = await prefiller.prefill(prefill("abc"))
        assert (done.stored_chunks, done.cached_tokens) == (1 + 3 + 1 + 2, 0)
        assert await completions(decoder, asked("cba")) == expected("cba")
        stats = await decoder.stats()
        assert stats.counters["chunks_loaded"] == 1 + 3 + 1 + 2
        assert (await prefiller.prefill(prefill("abc"))).computed_tokens == 0
        fingerprint = decoder.info.kv_spec.fingerprint
        keys = prompt_keys(fingerprint, b"", asked("cba").prompt_token_ids, CHUNK)
        stored = [bool(cluster.world.replicas(key)) for key in keys]
        exact = (len(HEADER) + len(TEXTS["c"])) // CHUNK
        assert stored == [at < exact for at in range(len(keys))], "nothing behind a document that is not exact"
        assert cluster.num_stored == 7 + exact - 1

    in_cluster(act)


def test_a_damaged_document_is_computed_again():
    async def act(cluster, prefiller, decoder):
        await prefiller.prefill(prefill("abc"))
        for chunk in range(7):
            cluster.damage(chunk)
        assert await completions(decoder, asked("cba")) == expected("cba")
        assert (await decoder.stats()).counters["chunk_miss_checksum"] >= 3

    in_cluster(act)


def test_requests_that_want_a_document_at_once_have_it_computed_once():
    told = []

    async def answer(engine, number):
        stream = await deltas(engine, asked("cb", f"d{number}", tail=[number]))
        told.append(stream[0].info)
        return [[token for delta in stream for token in delta.token_ids]]

    async def act(engine):
        legs = [answer(engine, number) for number in (5, 6, 7)]
        tokens = await asyncio.gather(*legs)
        assert tokens == [expected("cb", tail=[number]) for number in (5, 6, 7)]
        assert sum(info.prepared_tokens for info in told) == once
        return (await engine.stats()).counters["prefill_tokens"]

    once = CHUNK + 5 + 64 + 5 + 20  # the header, and its rest again for the second document
    # The header's rest: the others find it in chunks that reach into the exact document. Of each the token between, and
    # the second document's first ones; the last token counts as decoded.
    tails = 5 + 3 * (1 + K)
    assert alone(act) == once + tails


def test_who_leaves_takes_no_document_from_others_and_the_last_leaves_nothing_behind():
    async def act(engine):
        first, second = (asyncio.ensure_future(completions(engine, asked("ab", name))) for name in ("d1", "d2"))
        await asyncio.sleep(0.5)
        first.cancel()
        await asyncio.wait([first])
        assert await second == expected("ab")
        only = asyncio.ensure_future(completions(engine, asked("c", "d3")))
        await asyncio.sleep(0.5)
        only.cancel()
        await asyncio.wait([only])
        stats = await idle(engine)
        assert (stats.waiting, stats.used_blocks) == (0, 0)

    alone(act, slow_of())


def test_a_prefill_of_documents_is_aborted_kept_to_its_deadline_and_refused_by_a_closed_engine():
    async def act(engine):
        leg = asyncio.ensure_future(engine.prefill(prefill("abc")))
        await asyncio.sleep(0.5)
        await engine.abort("p")
        with pytest.raises(CancelledByPeerError):
            await leg
        await idle(engine)
        with pytest.raises(DeadlineExceededError):
            await engine.prefill(msgspec.structs.replace(prefill("abc"), deadline_s=0.5))
        await idle(engine)
        return engine

    async def main():
        async with lone_engine(slow_of()) as engine:
            await act(engine)
            left = asyncio.ensure_future(engine.prefill(prefill("abc")))
            await asyncio.sleep(0.5)
        with pytest.raises(CancelledByPeerError):
            await left
        with pytest.raises(NodeUnavailableError):
            await engine.prefill(prefill("abc"))

    run_sim(main, limit_s=200)


def test_a_prefill_whose_header_fails_ends_with_its_documents():
    async def act(engine):
        async def failing(_):
            await asyncio.sleep(0.5)
            raise OverloadedError("full")

        with pytest.raises(OverloadedError):
            await engine._desk.prefill(prefill("abc"), failing)
        began = asyncio.get_running_loop().time()
        await idle(engine)
        assert asyncio.get_running_loop().time() - began < 1.5, "the step under way at most"

    alone(act, slow_of())


def test_a_tenants_documents_are_found_by_that_tenant_alone():
    async def act(engine):
        for salt, prepared in ((b"one", True), (b"two", True), (b"one", False)):
            wanted = msgspec.structs.replace(asked("ba"), cache_salt=salt)
            [info] = [delta.info for delta in await deltas(engine, wanted) if delta.info is not None]
            assert bool(info.prepared_tokens) == prepared

    alone(act)


def test_a_document_whose_computation_fails_is_computed_with_the_prompt():
    async def main():
        runner = FailingRunner(CONFIG, "m", CHUNK)
        runner.failures = 1
        clock = LoopClock(asyncio.get_running_loop())
        options = EngineOptions.of(CONFIG, 30.0)
        async with EngineLoop(runner, None, options, clock) as engine:
            wanted = asked("b")
            assert await completions(engine, wanted) == expected_tokens(
                CONFIG, wanted.prompt_token_ids, wanted.sampling
            )
            assert await completions(engine, asked("ab", "next")) == expected("ab")
            await idle(engine)

    run_sim(main, limit_s=100)


@pytest.mark.parametrize("num_blocks", [29, 40])
def test_without_blocks_for_documents_beside_the_prompt_it_is_computed(num_blocks):
    """29 blocks hold the prompt and its output, and no document beside them."""
    wanted = asked("abc", max_tokens=5)

    async def act(engine):
        [tokens] = await completions(engine, wanted)
        assert len(tokens) == 5
        if num_blocks == 29:
            assert [tokens] == expected_tokens(CONFIG, wanted.prompt_token_ids, wanted.sampling)

    alone(act, msgspec.structs.replace(CONFIG, num_blocks=num_blocks))


def test_a_document_right_behind_the_header_is_found_by_its_prefix_too():
    """Its rows were moved there, past what was made findable."""

    async def act(engine):
        text = prompt_of(4 * CHUNK, 7)
        prompt = prompt_of(2 * CHUNK, 1) + text + TAIL
        said = Documents(header=2 * CHUNK, spans=[(2 * CHUNK, 6 * CHUNK)], k=K)
        await completions(engine, msgspec.structs.replace(request("first", prompt), documents=said))
        plain = await deltas(engine, request("plain", prompt))
        assert next(delta.info.cached_tokens for delta in plain if delta.info) == 6 * CHUNK

    alone(act)


def test_many_documents_of_one_request_leave_others_room_to_wait():
    texts = [prompt_of(20, seed) for seed in range(100, 140)]
    prompt, spans = list(HEADER), []
    for text in texts:
        spans.append((len(prompt), len(prompt) + len(text)))
        prompt += text
    config = msgspec.structs.replace(CONFIG, max_waiting=8, max_sequences=8)

    async def act(engine):
        wanted = msgspec.structs.replace(
            request("many", prompt + TAIL), documents=Documents(header=len(HEADER), spans=spans, k=K)
        )
        many = asyncio.create_task(deltas(engine, wanted))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await completions(engine, request("small", TAIL))
        info = next(delta.info for delta in await many if delta.info)
        assert info.approximate_tokens == 39 * (20 - K) and info.cached_tokens == CHUNK + 20, "all are reused"

    async def main():
        async with lone_engine(config) as engine:
            await act(engine)
            await idle(engine)

    run_sim(main, limit_s=100)
