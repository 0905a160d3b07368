"""What one node computes the others wait for while it gets on, and load; what one leg loads its brothers take."""

import asyncio
from contextlib import AsyncExitStack

import msgspec
import pytest
from support.engine_fakes import (
    CHUNK,
    CONFIG,
    Cluster,
    completions,
    deltas,
    idle,
    prefill_request,
    prompt_of,
    request,
)
from support.sim_loop import run_sim

from engines.sim.reference import expected_tokens
from kvcore.config.schema import StoreConfig
from kvcore.errors import CancelledByPeerError
from metadata_server.limits import ServerLimits
from nodeapi.messages import Handoff

SLOW = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=4 * CHUNK, max_batch_tokens=CHUNK)  # four chunks a second
CHUNKS = 8
PROMPT = prompt_of(CHUNKS * CHUNK + 7)
RIGHT = expected_tokens(CONFIG, PROMPT, request("d", PROMPT).sampling)


def in_cluster(act, nodes="pq", **settings):
    """`act(cluster, *engines)`; returns how many prompt tokens each of the nodes computed, and all counters."""

    async def main():
        cluster = Cluster(SLOW, **settings)
        engines = [cluster.engine(node) for node in nodes]
        async with asyncio.timeout(60):
            async with AsyncExitStack() as stack:
                for engine in engines:
                    await stack.enter_async_context(engine)
                await act(cluster, *engines)
                counters = [(await idle(engine)).counters for engine in engines]
        await cluster.aclose()
        return [each.get("prefill_tokens", 0) for each in counters], counters

    return run_sim(main, limit_s=100)


def seconds():
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("late_s", [0.0, 0.6])
def test_two_prefillers_compute_one_prompt_once(late_s):
    async def act(cluster, p, q):
        async def later(engine, name, after_s):
            await asyncio.sleep(after_s)
            return await engine.prefill(prefill_request(name, PROMPT))

        legs = [later(p, "p0", 0.0), later(q, "q0", late_s), later(p, "p1", 0.0), later(q, "q1", late_s)]
        done = await asyncio.gather(*legs)
        assert [each.stored_chunks for each in done] == [CHUNKS] * 4
        assert seconds() < CHUNKS / 4 + 0.5

    computed, counters = in_cluster(act)
    assert sum(computed) == CHUNKS * CHUNK and 0 in computed
    written = sum(each.get("chunks_stored", 0) for each in counters)
    assert CHUNKS <= written <= CHUNKS + 1, "but for the last chunk, which one writes while another finds it computed"
    assert not any(each.get("chunks_loaded") for each in counters), "nor read where nothing is computed"
    assert [each.get("cached_tokens") for each in counters] in ([256, 512], [512, 256])


def test_a_server_that_lets_nobody_wait_is_asked_in_measure():
    async def act(cluster, p, q):
        cluster.world.core._limits = ServerLimits(max_waiters=0)
        legs = [p.prefill(prefill_request("p", PROMPT)), q.prefill(prefill_request("q", PROMPT))]
        assert [done.stored_chunks for done in await asyncio.gather(*legs)] == [CHUNKS] * 2
        assert cluster.wires["q"].calls.count("wait") < 2 * CHUNKS / 4 / 0.05

    assert sum(in_cluster(act)[0]) == CHUNKS * CHUNK


def test_behind_another_nodes_prefix_a_prompt_computes_its_own():
    longer = PROMPT[: CHUNKS * CHUNK] + prompt_of(2 * CHUNK + 1, 3)

    async def act(cluster, p, q):
        first = asyncio.create_task(p.prefill(prefill_request("p", PROMPT)))
        await asyncio.sleep(0.1)
        behind = asyncio.create_task(q.prefill(prefill_request("q", longer)))
        await asyncio.sleep(1.0)
        assert (await q.stats()).counters["chunks_loaded"] > 1, "they are read as they come"
        second = await behind
        assert (second.cached_tokens, second.computed_tokens) == (CHUNKS * CHUNK, 2 * CHUNK)
        assert second.timings.wait_s > 1.0, "the record says that it has waited"
        await first

    computed, counters = in_cluster(act)
    assert computed == [CHUNKS * CHUNK, 2 * CHUNK] and counters[1]["chunks_loaded"] == CHUNKS


def test_a_decoder_without_a_prefiller_waits_for_the_node_that_computes():
    async def act(cluster, p, d):
        leg = asyncio.create_task(p.prefill(prefill_request("p", PROMPT)))
        await asyncio.sleep(0.1)
        assert await completions(d, request("d", PROMPT)) == RIGHT
        await leg

    assert in_cluster(act, "pd")[0] == [CHUNKS * CHUNK, 6]


def test_with_salts_nodes_share_nothing():
    async def act(cluster, p, q):
        legs = [(p, b"one"), (q, b"two")]
        requests = [msgspec.structs.replace(prefill_request("r", PROMPT), cache_salt=salt) for _, salt in legs]
        await asyncio.gather(*(engine.prefill(wanted) for (engine, _), wanted in zip(legs, requests, strict=True)))

    assert in_cluster(act)[0] == [CHUNKS * CHUNK] * 2


def test_when_the_computing_leg_is_aborted_the_other_node_goes_on_from_there():
    async def act(cluster, p, q):
        first = asyncio.create_task(p.prefill(prefill_request("p", PROMPT)))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(q.prefill(prefill_request("q", PROMPT)))
        await asyncio.sleep(0.9)
        stored = cluster.num_stored
        assert stored
        await p.abort("p")
        done = await second
        assert done.stored_chunks == CHUNKS and done.computed_tokens == (CHUNKS - stored) * CHUNK
        assert seconds() < 1.0 + (CHUNKS - stored) / 4 + 0.5, "it asks again four times a second"
        with pytest.raises(CancelledByPeerError):
            await first

    in_cluster(act)


def first_write_hangs():
    """A fault hook, and the event that says that it has hung."""
    stuck = asyncio.Event()

    async def hang(direction, op):
        if direction == "write" and not stuck.is_set():
            stuck.set()
            await asyncio.sleep(25)

    return hang, stuck


def test_a_decoder_that_is_told_to_compute_waits_for_no_other_node():
    hang, stuck = first_write_hangs()

    async def act(cluster, p, d):
        leg = asyncio.create_task(p.prefill(prefill_request("p", PROMPT)))
        await stuck.wait()
        began = seconds()
        wanted = request("d", PROMPT, handoff=Handoff(num_chunks=CHUNKS, wait_s=50.0), max_tokens=1)
        decode = asyncio.create_task(completions(d, wanted))
        await asyncio.sleep(0.5)
        await d.end_handoff("d")
        await decode
        assert seconds() - began < 0.5 + CHUNKS / 4 + 0.5
        await leg

    in_cluster(act, "pd", fault=hang)


def test_a_node_that_does_not_get_on_is_waited_for_a_second():
    hang, stuck = first_write_hangs()

    async def act(cluster, p, *others):
        first = asyncio.create_task(p.prefill(prefill_request("p", PROMPT)))
        await stuck.wait()
        began = seconds()
        legs = [each.prefill(prefill_request(f"{number}", PROMPT)) for number in range(2) for each in others]
        done = await asyncio.gather(*legs)
        assert [each.stored_chunks for each in done] == [CHUNKS] * 6, "a second copy of each may be written"
        assert 1.0 + CHUNKS / 4 <= seconds() - began < 1.5 + CHUNKS / 4
        await first

    computed, counters = in_cluster(act, "pqrs", fault=hang)
    assert computed[0] == sum(computed[1:]) == CHUNKS * CHUNK, "of those that waited one computes"
    assert [each.get("follow_given_up", 0) for each in counters] == [0, 1, 1, 1]


def test_a_prefill_ends_when_what_the_others_write_is_complete():
    async def act(cluster, p, q):
        cluster.world.state._reservations._config = StoreConfig(max_replicas=1, retire_grace_s=0.0)
        first = asyncio.create_task(p.prefill(prefill_request("p", PROMPT)))
        await asyncio.sleep(0.1)
        behind = asyncio.create_task(p.prefill(prefill_request("p2", PROMPT)))
        await asyncio.sleep(CHUNKS / 4 - 0.15)
        gate = cluster.wires["p"].before["commit"] = asyncio.Event()
        asyncio.get_running_loop().call_later(0.25, gate.set)  # sooner than it would be given up
        assert (await behind).stored_chunks == (await first).stored_chunks == CHUNKS

    assert in_cluster(act)[0] == [CHUNKS * CHUNK, 0]


def test_one_leg_loads_what_its_brothers_need_too():
    async def act(cluster, p, d):
        handoff = Handoff(num_chunks=CHUNKS, wait_s=50.0)
        legs = [completions(d, request(f"d{i}", PROMPT, handoff=handoff)) for i in range(5)]
        answers = await asyncio.gather(*legs, p.prefill(prefill_request("p", PROMPT)))
        assert answers[:5] == [RIGHT] * 5

    assert in_cluster(act, "pd")[1][1]["chunks_loaded"] == CHUNKS


def test_a_leg_that_need_not_wait_does_not_wait_for_a_brother_that_does():
    async def act(cluster, p, d):
        handoff = Handoff(num_chunks=CHUNKS, wait_s=50.0)  # nobody computes: the router has lost the prefiller
        waiting = [asyncio.create_task(deltas(d, request(f"d{i}", PROMPT, handoff=handoff))) for i in range(3)]
        await asyncio.sleep(1.0)
        assert (await d.stats()).loading == 1
        await d.end_handoff("d2")
        assert await completions(d, request("own", PROMPT)) == RIGHT
        assert (await waiting[2])[0].info is not None
        await asyncio.gather(*waiting)
        assert seconds() < 1.0 + CHUNKS / 4 + 1.5, "what one of them computes, the others find in the store"

    assert in_cluster(act, "pd")[0][0] == 0


def test_brothers_of_a_load_wait_no_longer_than_their_own_time():
    async def act(cluster, p, d):
        legs = [request(f"d{i}", PROMPT, handoff=Handoff(num_chunks=CHUNKS, wait_s=3.0)) for i in range(4)]
        running = [asyncio.create_task(completions(d, wanted)) for wanted in legs]
        await asyncio.sleep(2.5)
        await d.abort("d0")  # it was the one that loaded
        assert (await asyncio.gather(*running))[1:] == [RIGHT] * 3
        assert seconds() < 3.0 + CHUNKS / 4 + 1.5

    in_cluster(act, "pd")


def test_a_short_prompt_is_not_held_up_by_the_load_of_a_long_one_with_the_same_beginning():
    short = PROMPT[:CHUNK] + prompt_of(5, 4)

    async def act(cluster, p, d):
        handoff = Handoff(num_chunks=CHUNKS, wait_s=50.0)
        long = asyncio.create_task(completions(d, request("long", PROMPT, handoff=handoff)))
        await asyncio.sleep(0.05)
        quick = asyncio.create_task(
            completions(d, request("short", short, handoff=Handoff(num_chunks=1, wait_s=50.0), max_tokens=1))
        )
        leg = asyncio.create_task(p.prefill(prefill_request("p", PROMPT)))
        await quick
        assert seconds() < 1.0 and not leg.done()
        await asyncio.gather(long, leg)

    in_cluster(act, "pd")
