"""A prefill whose chunks find no room ends before it computes, and says so; one that finds some goes on."""

import asyncio
import logging

import msgspec
import pytest
from support.engine_fakes import CHUNK, CONFIG, Cluster, completions, idle, prefill_request, prompt_of, request
from support.sim_loop import run_sim

from engines.sim.reference import expected_tokens
from kvstore.chunk_format import HEADER_BYTES
from metadata_server.messages import MatchRequest

SLOW = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=CHUNK, max_batch_tokens=CHUNK)  # a chunk a second
CHUNKS = 6
PROMPT = prompt_of(CHUNKS * CHUNK + 7)
ROOM = 4096
"""What one chunk takes in a segment."""


def in_cluster(act, segment_bytes):
    """`act(cluster, prefiller, decoder)`; returns the prefiller's counters."""

    async def main():
        cluster = Cluster(SLOW, segment_bytes=segment_bytes)
        async with cluster.engine("p") as prefiller, cluster.engine("d") as decoder:
            await act(cluster, prefiller, decoder)
            counters = (await idle(prefiller)).counters
            await idle(decoder)
        await cluster.aclose()
        return counters

    assert HEADER_BYTES + CHUNK * CONFIG.bytes_per_token <= ROOM
    return run_sim(main, limit_s=200)


def seconds():
    return asyncio.get_running_loop().time()


def test_with_room_for_nothing_it_ends_at_once_and_the_decoder_computes(caplog):
    async def act(cluster, prefiller, decoder):
        legs = [prefiller.prefill(prefill_request(f"p{number}", prompt_of(200, number))) for number in range(4)]
        for done in await asyncio.gather(*legs):
            assert done.no_room and (done.computed_tokens, done.stored_chunks) == (0, 0)
        assert seconds() < 0.1
        wanted = request("d", PROMPT)
        assert await completions(decoder, wanted) == expected_tokens(CONFIG, PROMPT, wanted.sampling)

    with caplog.at_level(logging.WARNING, "engines"):
        counters = in_cluster(act, ROOM // 2)
    assert counters["prefills_without_room"] == 4 and not counters.get("prefill_tokens")
    assert ["no_room" in record.getMessage() for record in caplog.records] == [True], "one line for all of them"


def test_after_a_minute_it_is_said_again(caplog):
    async def act(cluster, prefiller, decoder):
        for _ in range(3):
            await prefiller.prefill(prefill_request("p", PROMPT))
            await asyncio.sleep(40)

    with caplog.at_level(logging.WARNING, "engines"):
        in_cluster(act, ROOM // 2)
    assert len(caplog.records) == 2


def test_with_room_for_some_it_goes_on():
    async def act(cluster, prefiller, decoder):
        done = await prefiller.prefill(prefill_request("p", PROMPT))
        assert not done.no_room and done.computed_tokens == CHUNKS * CHUNK and 0 < done.stored_chunks < CHUNKS

    assert not in_cluster(act, 2 * ROOM).get("prefills_without_room")


def test_behind_a_stored_prefix_without_room_it_ends_with_what_there_is():
    async def act(cluster, prefiller, decoder):
        first = await prefiller.prefill(prefill_request("p", PROMPT))
        assert first.stored_chunks
        keys = [key for batch in cluster.world.core.snapshot() for event in batch.events for key in event.keys]
        for key in keys:  # a reader holds them: nothing can be evicted
            lease = MatchRequest(keys=[key], lease_s=100.0, node_id="d", incarnation=1)
            cluster.world.core.match(lease, cluster.clock.now())
        began = seconds()
        done = await decoder.prefill(prefill_request("again", PROMPT))
        assert done.no_room and done.stored_chunks == first.stored_chunks and done.computed_tokens == 0
        assert seconds() - began < 0.1
        cluster.world.core.state.release(cluster.world.core.state._reading.leases.of_holder("d"), cluster.clock.now())

    in_cluster(act, 2 * ROOM)


@pytest.mark.parametrize("path", ["reserve", ""])
def test_a_metadata_server_that_is_away_is_no_lack_of_room(path):
    async def act(cluster, prefiller, decoder):
        cluster.wires["p"].down.add(path)
        done = await prefiller.prefill(prefill_request("p", PROMPT))
        assert not done.no_room and done.computed_tokens == CHUNKS * CHUNK

    in_cluster(act, 100 * ROOM)
