"""Documents that another node computes: who waits for them, how long, and where that time is counted."""

import asyncio

import msgspec
import pytest
from support.documents import asked, expected, prefill, slow_of
from support.engine_fakes import CHUNK, completions, deltas, in_cluster

from nodeapi.messages import Handoff


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


@pytest.mark.parametrize("ends", ["the handoff", "the time"])
def test_a_request_whose_wait_is_over_ends_nobody_elses(ends):
    """It computes the document itself, slowly; the other one has it from the prefiller meanwhile."""

    async def act(_, prefiller, decoder):
        short = asked("bca", "short", handoff=Handoff(num_chunks=1, wait_s=0.5 if ends == "the time" else 50.0))
        patient = asked("bca", "patient", handoff=Handoff(num_chunks=1, wait_s=50.0))
        legs = [asyncio.ensure_future(deltas(decoder, wanted)) for wanted in (short, patient)]
        await asyncio.sleep(0.4)
        if ends == "the handoff":
            await decoder.end_handoff("short")
        await asyncio.sleep(0.4)
        await prefiller.prefill(prefill("bca"))
        done, _ = await asyncio.wait(legs, return_when=asyncio.FIRST_COMPLETED)
        assert done == {legs[1]}, "the patient one is not held up by what the other one computes"
        first, other = [(await leg)[0].info for leg in legs]
        assert other.prepared_tokens == 0 and other.moved
        assert first.prepared_tokens > 0

    in_cluster(act, configs={"d": slow_of()})


def test_who_waits_and_who_does_not_have_a_document_computed_once():
    async def act(_, prefiller, decoder):
        waiting = asked("bca", "waits", handoff=Handoff(num_chunks=1, wait_s=50.0))
        legs = [asyncio.ensure_future(deltas(decoder, wanted)) for wanted in (waiting, asked("bca", "does-not"))]
        await asyncio.sleep(0.4)
        await decoder.end_handoff("waits")
        async with asyncio.timeout(40.0):
            infos = [stream[0].info for stream in await asyncio.gather(*legs)]
        assert sum(info.prepared_tokens for info in infos) == CHUNK + 5 + 20 + 5 + 64 + 5 + 77

    in_cluster(act, configs={"d": slow_of()})


def test_what_another_request_computed_here_is_waited_for_no_longer():
    async def act(_, prefiller, decoder):
        waiting = asked("bca", "waits", handoff=Handoff(num_chunks=1, wait_s=50.0))
        leg = asyncio.ensure_future(deltas(decoder, waiting))
        await completions(decoder, asked("bca", "does-not"))
        async with asyncio.timeout(5.0):
            assert (await leg)[0].info.prepared_tokens == 0

    in_cluster(act, segment_bytes=4096)  # the store has no room for it


def test_the_time_for_documents_is_no_queueing():
    async def slow_wire(*_):
        await asyncio.sleep(0.01)

    async def act(_, prefiller, decoder):
        done = await prefiller.prefill(prefill("abc"))
        assert done.timings.compute_s == pytest.approx(done.computed_tokens / CHUNK, rel=0.1)
        loaded = (await deltas(decoder, asked("cba", "loads")))[0].info.timings
        assert loaded.load_s >= 0.03 and loaded.wait_s < 0.01
        others = msgspec.structs.replace(asked("cba", "computes"), cache_salt=b"other")
        waited = (await deltas(decoder, others))[0].info.timings
        assert waited.wait_s > 1.0
        for spent in (loaded, waited):
            assert 0 <= spent.queue_s < 0.1

    in_cluster(act, configs={"p": slow_of(), "d": slow_of()}, fault=slow_wire)
