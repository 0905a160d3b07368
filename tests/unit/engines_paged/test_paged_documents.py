"""Documents of prompts in engines over a store: which tokens come out, what is moved, and what is never kept."""

import asyncio

import msgspec
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

from engines.sim.reference import expected_tokens
from kvcore.chunk_keys import prompt_keys
from nodeapi.documents import Documents
from nodeapi.messages import GenerateRequest, Handoff, PrefillRequest

HEADER = prompt_of(CHUNK + 5, 1)
TEXTS = {name: prompt_of(length, seed) for seed, (name, length) in enumerate([("a", 77), ("b", 20), ("c", 64)], 2)}
TAIL = prompt_of(13, 9)
K = 4


def joined(order: str, tail: list[int] = TAIL, k: int = K) -> tuple[list[int], Documents]:
    """A prompt with the texts in this order, a token of its own before each but the first."""
    prompt, spans = list(HEADER), []
    for at, name in enumerate(order):
        prompt += [400 + at] * bool(at)
        spans.append((len(prompt), len(prompt) + len(TEXTS[name])))
        prompt += TEXTS[name]
    return prompt + tail, Documents(header=len(HEADER), spans=spans, k=k)


def asked(
    order: str, request_id: str = "d", *, k: int = K, tail: list[int] = TAIL, **fields: object
) -> GenerateRequest:
    prompt, documents = joined(order, tail, k)
    return msgspec.structs.replace(request(request_id, prompt, **fields), documents=documents)


def expected(order: str, **fields: object) -> list[list[int]]:
    wanted = asked(order, **fields)
    return expected_tokens(CONFIG, wanted.prompt_token_ids, wanted.sampling, documents=wanted.documents)


def prefill(order: str) -> PrefillRequest:
    prompt, documents = joined(order)
    return PrefillRequest(request_id="p", prompt_token_ids=prompt, documents=documents, deadline_s=100.0)


def alone(act):
    async def main():
        async with lone_engine() as engine:
            result = await act(engine)
            await idle(engine)
            return result

    return run_sim(main, limit_s=100)


def in_cluster(act, **settings):
    async def main():
        cluster = Cluster(**settings)
        async with cluster.engine("p") as prefiller, cluster.engine("d") as decoder:
            result = await act(cluster, prefiller, decoder)
            await idle(prefiller)
            await idle(decoder)
        await cluster.aclose()
        return result

    return run_sim(main, limit_s=100)


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


def test_a_decoder_waits_for_the_documents_of_its_handoff():
    async def act(_, prefiller, decoder):
        wanted = asked("bca", handoff=Handoff(num_chunks=1, wait_s=50.0))
        leg = asyncio.ensure_future(completions(decoder, wanted))
        await asyncio.sleep(0.5)
        await prefiller.prefill(prefill("bca"))
        assert await leg == expected("bca")
        assert (await decoder.stats()).counters["chunks_loaded"] == 7

    in_cluster(act)


def test_a_decoder_whose_handoff_ends_computes_the_documents_itself():
    async def act(_, prefiller, decoder):
        wanted = asked("bca", handoff=Handoff(num_chunks=1, wait_s=50.0))
        leg = asyncio.ensure_future(completions(decoder, wanted))
        await asyncio.sleep(0.5)
        await decoder.end_handoff("d")
        async with asyncio.timeout(5.0):
            assert await leg == expected("bca")

    in_cluster(act)


def test_a_damaged_document_is_computed_again():
    async def act(cluster, prefiller, decoder):
        await prefiller.prefill(prefill("abc"))
        for chunk in range(7):
            cluster.damage(chunk)
        assert await completions(decoder, asked("cba")) == expected("cba")
        assert (await decoder.stats()).counters["chunk_miss_checksum"] >= 3

    in_cluster(act)
