"""KV goes from engine to engine through a real store, and whatever the store does the tokens are right."""

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
    in_cluster,
    prefill_request,
    prompt_of,
    request,
    settle,
)
from support.sim_loop import run_sim

from engines.sim.reference import expected_tokens
from kvcore.config.schema import StoreConfig
from nodeapi.messages import Handoff, PrefillRequest

PROMPT = prompt_of(3 * CHUNK + 7)
WANTED = request("d", PROMPT)
EXPECTED = expected_tokens(CONFIG, PROMPT, WANTED.sampling)


def tokens_of(stream):
    return [[token for delta in stream for token in delta.token_ids]]


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7, CONFIG.max_context - 5])
def test_the_decoder_computes_only_the_tail(length):
    prompt = prompt_of(length)
    usable = (length - 1) // CHUNK

    async def act(_, prefiller, decoder):
        done = await prefiller.prefill(prefill_request("p", prompt))
        assert (done.stored_chunks, done.cached_tokens, done.computed_tokens) == (usable, 0, usable * CHUNK)
        stream = await deltas(decoder, request("d", prompt))
        assert stream[0].info.cached_tokens == usable * CHUNK
        assert stream[0].info.computed_tokens == length - usable * CHUNK
        if usable:
            assert done.moved[0].num_bytes == stream[0].info.moved[0].num_bytes >= usable * CHUNK * 32
        return tokens_of(stream)

    assert in_cluster(act) == expected_tokens(CONFIG, prompt, request("d", prompt).sampling)


def test_with_a_handoff_chunks_are_loaded_while_the_prefiller_still_runs():
    config = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=CHUNK, max_batch_tokens=CHUNK)  # a chunk a second

    async def act(_, prefiller, decoder):
        legs = [
            prefiller.prefill(prefill_request("p", PROMPT)),
            deltas(decoder, msgspec.structs.replace(WANTED, handoff=Handoff(num_chunks=3, wait_s=50.0))),
        ]
        running = [asyncio.ensure_future(leg) for leg in legs]

        async def first_loaded():
            return (await decoder.stats()).counters.get("chunks_loaded", 0) == 1

        await settle(first_loaded)
        assert not running[0].done()
        own = request("own", prompt_of(20, 5))  # others do not wait for the load
        assert await completions(decoder, own) == expected_tokens(config, own.prompt_token_ids, own.sampling)
        assert not running[0].done()
        _, stream = await asyncio.gather(*running)
        assert stream[0].info.cached_tokens == 3 * CHUNK
        assert stream[0].info.timings.wait_s > 2.0
        return tokens_of(stream)

    assert in_cluster(act, config=config) == EXPECTED


def test_no_token_waits_for_a_lease_to_be_given_back():
    async def act(cluster, prefiller, decoder):
        await prefiller.prefill(prefill_request("p", PROMPT))
        cluster.wires["d"].before["release"] = asyncio.Event()
        stream = await deltas(decoder, WANTED)
        assert stream[0].info.cached_tokens == 3 * CHUNK
        assert cluster.world.stats().read_leases == 1
        cluster.wires["d"].before["release"].set()
        return tokens_of(stream)

    assert in_cluster(act) == EXPECTED


@pytest.mark.parametrize("before", [True, False])
def test_end_handoff_takes_what_is_there(before):
    async def act(_, prefiller, decoder):
        if before:
            await prefiller.prefill(prefill_request("p", PROMPT[: 2 * CHUNK + 1]))
        wanted = msgspec.structs.replace(WANTED, handoff=Handoff(num_chunks=3, wait_s=90.0))
        task = asyncio.create_task(deltas(decoder, wanted))
        await asyncio.sleep(1.0)
        await decoder.end_handoff("d")
        started = asyncio.get_running_loop().time()
        stream = await task
        assert asyncio.get_running_loop().time() - started < 1.0
        assert stream[0].info.cached_tokens == (2 * CHUNK if before else 0)
        return tokens_of(stream)

    assert in_cluster(act) == EXPECTED


def test_a_handoff_that_never_comes_is_waited_for_only_so_long():
    async def act(_, __, decoder):
        wanted = msgspec.structs.replace(WANTED, handoff=Handoff(num_chunks=3, wait_s=2.0))
        stream = await deltas(decoder, wanted)
        assert 2.0 <= stream[0].info.timings.wait_s < 2.5
        return tokens_of(stream)

    assert in_cluster(act) == EXPECTED


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_damaged_chunk_is_computed_and_counted(chunk):
    async def act(cluster, prefiller, decoder):
        await prefiller.prefill(prefill_request("p", PROMPT))
        cluster.damage(chunk)
        stream = await deltas(decoder, WANTED)
        assert stream[0].info.cached_tokens == chunk * CHUNK
        assert stream[0].info.computed_tokens == len(PROMPT) - chunk * CHUNK
        assert (await decoder.stats()).counters["chunk_miss_checksum"] == 1
        return tokens_of(stream)

    assert in_cluster(act) == EXPECTED


def test_a_store_that_is_full_fails_nothing():
    async def act(_, prefiller, decoder):
        done = await prefiller.prefill(prefill_request("p", PROMPT))
        assert (done.stored_chunks, done.computed_tokens) == (0, 0)
        tokens = await completions(decoder, WANTED)
        assert (await idle(decoder)).counters["save_declined"] == 3
        return tokens

    assert in_cluster(act, segment_bytes=4096 // 8) == EXPECTED


def test_a_prompt_that_takes_longer_than_a_reservation_lasts_is_stored_to_its_end():
    config = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=CHUNK, max_batch_tokens=CHUNK)  # a chunk a second
    prompt = prompt_of(9 * CHUNK + 1)

    async def act(cluster, prefiller, decoder):
        for store in cluster.world.stores:
            store._placement._config = StoreConfig(reserve_ttl_s=3.0)
        done = await prefiller.prefill(prefill_request("p", prompt))
        assert (done.stored_chunks, done.computed_tokens) == (9, 9 * CHUNK)

    in_cluster(act, config=config)


def test_a_metadata_server_that_is_away_fails_nothing():
    async def act(cluster, prefiller, decoder):
        for wire in cluster.wires.values():
            wire.down.add("")
        assert (await prefiller.prefill(prefill_request("p", PROMPT))).stored_chunks == 0
        handoff = Handoff(num_chunks=3, wait_s=1.0)
        return await completions(decoder, msgspec.structs.replace(WANTED, handoff=handoff))

    assert in_cluster(act) == EXPECTED


def test_a_metadata_server_away_for_a_moment_costs_a_prefill_no_chunk():
    config = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=CHUNK, max_batch_tokens=CHUNK)  # a chunk a second

    async def act(cluster, prefiller, _):
        wire = cluster.wires["p"]
        wire.down.add("reserve")
        prefill = asyncio.create_task(prefiller.prefill(prefill_request("p", PROMPT)))
        await wire.arrived["reserve"].wait()
        await asyncio.sleep(0.5)
        wire.down.clear()
        assert (await prefill).stored_chunks == 3
        assert wire.calls.count("reserve") == 2

    in_cluster(act, config=config)


def test_a_metadata_server_that_starts_again_costs_a_prefill_one_batch_of_chunks():
    config = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=CHUNK, max_batch_tokens=CHUNK)  # a chunk a second
    prompt = prompt_of(6 * CHUNK)

    async def act(cluster, prefiller, _):
        prefill = asyncio.create_task(prefiller.prefill(prefill_request("p", prompt)))
        await cluster.wires["p"].arrived["commit"].wait()
        await asyncio.sleep(0.5)
        cluster.forget_chunks()
        await prefill
        assert cluster.num_stored == 3  # of five: the first was forgotten, the second refused

    in_cluster(act, config=config)


def test_a_prefill_stores_again_what_the_store_has_lost():
    async def act(cluster, prefiller, _):
        await prefiller.prefill(prefill_request("p", PROMPT))
        cluster.forget_chunks()
        again = await prefiller.prefill(prefill_request("q", PROMPT))
        assert (again.cached_tokens, again.computed_tokens, again.stored_chunks) == (3 * CHUNK, 0, 3)
        assert cluster.num_stored == 3

    in_cluster(act)


def test_a_second_prefiller_neither_computes_nor_reads_what_is_stored():
    async def act(_, prefiller, other):
        await prefiller.prefill(prefill_request("p", PROMPT))
        done = await other.prefill(prefill_request("q", PROMPT))
        assert (done.cached_tokens, done.computed_tokens, done.stored_chunks) == (3 * CHUNK, 0, 3)
        assert not done.moved

    in_cluster(act)


def test_requests_with_one_prefix_at_the_same_time():
    requests = [request(f"r{n}", PROMPT + prompt_of(n, n), n=1 + n % 2, temperature=0.7, seed=n) for n in range(6)]

    async def act(_, prefiller, decoder):
        legs = [prefiller.prefill(prefill_request(r.request_id, r.prompt_token_ids)) for r in requests]
        handoff = Handoff(num_chunks=3, wait_s=10.0)
        streams = [completions(decoder, msgspec.structs.replace(r, handoff=handoff)) for r in requests]
        done = await asyncio.gather(*legs, *streams)
        assert all(result.stored_chunks >= 3 for result in done[:6])
        return done[6:]

    for wanted, tokens in zip(requests, in_cluster(act), strict=True):
        assert tokens == expected_tokens(CONFIG, wanted.prompt_token_ids, wanted.sampling)


def test_generated_chunks_are_saved_and_another_decoder_takes_over():
    wanted = request("a", PROMPT, max_tokens=100)
    whole = expected_tokens(CONFIG, PROMPT, wanted.sampling)

    async def act(cluster, first, second):
        stream = first.generate(wanted)
        got = [token async for delta in stream for token in delta.token_ids][:80]
        await idle(first)
        assert cluster.num_stored == (len(PROMPT) + 99) // CHUNK
        rest = await deltas(second, request("b", PROMPT, output=got, max_tokens=100))
        assert (await second.stats()).counters["chunks_loaded"] == (len(PROMPT) + 79) // CHUNK
        return [got + tokens_of(rest)[0]]

    assert in_cluster(act) == whole


def test_a_small_pool_with_store_and_handoffs_still_answers_all():
    config = msgspec.structs.replace(CONFIG, num_blocks=40)
    requests = [request(f"r{n}", prompt_of(40 + 17 * n, n), max_tokens=60) for n in range(8)]

    async def act(_, prefiller, decoder):
        legs = [prefiller.prefill(prefill_request(r.request_id, r.prompt_token_ids)) for r in requests]
        handoff = Handoff(num_chunks=9, wait_s=2.0)
        streams = [completions(decoder, msgspec.structs.replace(r, handoff=handoff)) for r in requests]
        return (await asyncio.gather(*legs, *streams))[8:]

    for wanted, tokens in zip(requests, in_cluster(act, config=config), strict=True):
        assert tokens == expected_tokens(config, wanted.prompt_token_ids, wanted.sampling)


def test_sixteen_stores_beside_two_small_decoders_keep_prompts_that_the_decoders_cannot():
    async def main():
        cluster = Cluster(segment_bytes=8 * 4096)
        for number in range(16):
            cluster.world.add_node(f"s{number}", 64 * 4096)
        prompts = [prompt_of(8 * CHUNK + 1, seed) for seed in range(60)]
        async with cluster.engine("p") as prefiller, cluster.engine("d0") as first, cluster.engine("d1") as second:
            for number, prompt in enumerate(prompts):
                wanted = PrefillRequest(
                    request_id=f"p{number}",
                    prompt_token_ids=prompt,
                    prefer_segment=f"d{number % 2}.1",
                    deadline_s=100.0,
                )
                assert (await prefiller.prefill(wanted)).stored_chunks == 8
            cached = 0
            for number, prompt in enumerate(prompts):
                wanted = request(f"g{number}", prompt, max_tokens=1)
                cached += (await deltas((first, second)[number % 2], wanted))[0].info.cached_tokens
        assert not cluster.world.stats().counters["evicted"]
        await cluster.aclose()
        return cached

    assert run_sim(main, limit_s=1000) == 60 * 8 * CHUNK
