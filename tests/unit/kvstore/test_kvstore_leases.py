"""Read leases from their reader's side: given back unseen, renewed while bytes move, none for who only looks."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support.sim_loop import LoopClock, run_sim
from support.store_fakes import KEYS, World, buffers, put

from kvcore.config.schema import StoreConfig
from kvcore.errors import PeerUnreachableError
from kvcore.types import ChunkKey
from kvstore.limits import StoreLimits
from kvstore.store import KVStore
from kvstore.types import GetOutcome
from transfer.inproc import InprocFault, InprocTransfer

LEASE_S = 4.0
NEW_KEY = ChunkKey(b"n" * 16)


def simulated(body: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """The test in virtual time: a read of a minute costs nothing."""

    def run() -> None:
        run_sim(body)

    run.__name__, run.__doc__ = body.__name__, body.__doc__
    return run


async def world_with(fault=None, lease_s: float = LEASE_S, **limits: Any) -> tuple[World, KVStore, Any]:
    world = World()
    world.limits = StoreLimits(**limits)
    world.use(LoopClock(asyncio.get_running_loop()))
    world.add_node("a")
    world.add_node("b")
    store, wire = world.store("a", InprocTransfer(world.memory, fault), config=StoreConfig(read_lease_s=lease_s))
    await put(store)
    assert store._placement._leases.named, "the server has said its version by now"
    return world, store, wire


def slow_reads(seconds: float, fail: bool = False):
    async def fault(direction, op):
        if direction == "read":
            await asyncio.sleep(seconds)
            return InprocFault(PeerUnreachableError("gone")) if fail else None
        return None

    return fault


# --- renewed while bytes move --------------------------------------------------------------------------------------


@simulated
async def test_a_read_that_takes_longer_than_its_lease_keeps_it():
    world, store, _ = await world_with(slow_reads(10.0))
    match = await store.match(KEYS, timeout_s=5)
    reading = asyncio.create_task(store.get_into(match, 0, buffers(3), timeout_s=60))
    for _ in range(29):
        await asyncio.sleep(1.0)
        assert (world.stats().read_leases, reading.done()) == (1, False)
    assert (await reading).outcomes == [GetOutcome.OK] * 3
    assert store.counters()["leases_renewed"] > 20
    await store.release(match)
    assert world.stats().read_leases == 0
    await world.aclose()


@pytest.mark.parametrize("how", ["ended", "failed", "cancelled"])
def test_nothing_renews_a_lease_once_its_transfer_has(how):
    async def body():
        world, store, wire = await world_with(slow_reads(10.0, fail=how == "failed"))
        match = await store.match(KEYS[:1], timeout_s=5)
        reading = asyncio.create_task(store.get_into(match, 0, buffers(1), timeout_s=60))
        await asyncio.sleep(9.0)
        if how == "cancelled":
            reading.cancel()
        await asyncio.wait({reading})
        renewals = wire.calls.count("renew")
        assert renewals and world.stats().read_leases == 1
        await asyncio.sleep(LEASE_S + 1.0)
        assert (wire.calls.count("renew"), world.stats().read_leases) == (renewals, 0)
        assert world.state.counters["leases_expired"] == 1
        await world.aclose()

    run_sim(body)


@simulated
async def test_reads_that_are_over_soon_renew_nothing_and_later_ones_of_the_same_match_do():
    world, store, wire = await world_with(slow_reads(0.5))
    match = await store.match(KEYS, timeout_s=5)
    await store.get_into(match, 0, buffers(1), timeout_s=60)
    assert "renew" not in wire.calls
    await asyncio.sleep(2.0)
    await store.get_into(match, 1, buffers(1), timeout_s=60)
    assert wire.calls.count("renew") == 1, "most of the lease was over"
    await store.get_into(match, 2, buffers(1), timeout_s=60)
    assert wire.calls.count("renew") == 1
    await store.release(match)
    await world.aclose()


@simulated
async def test_a_lease_that_a_new_life_of_the_server_does_not_know_is_not_asked_for_again():
    world, store, wire = await world_with(slow_reads(10.0))
    match = await store.match(KEYS, timeout_s=5)
    reading = asyncio.create_task(store.get_into(match, 0, buffers(3), timeout_s=60))
    await asyncio.sleep(1.0)
    world.restart_metadata(epoch="2", first_generation=1 << 30)
    assert (await reading).outcomes == [GetOutcome.OK] * 3
    assert store.counters()["leases_lost"] == wire.calls.count("renew") == 1
    await world.aclose()


@simulated
async def test_a_renewal_that_fails_is_tried_again_while_the_transfer_goes_on():
    world, store, wire = await world_with(slow_reads(10.0))
    match = await store.match(KEYS[:1], timeout_s=5)
    wire.down.add("renew")
    reading = asyncio.create_task(store.get_into(match, 0, buffers(1), timeout_s=60))
    await asyncio.sleep(2.0)
    wire.down.clear()
    await reading
    assert world.stats().read_leases == 1
    await store.release(match)
    await world.aclose()


# --- given back without having been seen --------------------------------------------------------------------------


@simulated
async def test_a_wait_that_is_cancelled_as_its_answer_is_under_way_leaves_no_lease():
    world, store, wire = await world_with()
    wire.after["wait"] = asyncio.Event()
    waiting = asyncio.create_task(store.wait(KEYS, more_than=0, timeout_s=5))
    await wire.arrived["wait"].wait()
    await asyncio.sleep(0.001)
    assert world.stats().read_leases == 1, "granted, and nobody has seen it"
    waiting.cancel()
    await asyncio.wait({waiting})
    await asyncio.sleep(0.1)
    assert world.stats().read_leases == 0
    await world.aclose()


@simulated
async def test_room_that_is_granted_too_late_to_be_seen_is_given_back():
    world, store, wire = await world_with()
    wire.after["reserve"] = asyncio.Event()
    session = await store.begin_put([NEW_KEY], prefer_segment=None, timeout_s=1)
    assert not session.wants(NEW_KEY) and session.stale
    assert world.stats().reservations == 1
    await asyncio.sleep(4.0)  # a server that was late is left alone for a moment
    assert world.stats().reservations == 0
    await session.aclose()
    await world.aclose()


@pytest.mark.parametrize("ask", ["match", "wait"])
def test_an_answer_that_does_not_come_in_time_leaves_no_lease(ask):
    async def body():
        world, store, wire = await world_with(lease_s=60.0)
        wire.after[ask] = asyncio.Event()
        if ask == "match":
            match = await store.match(KEYS, timeout_s=1)
        else:
            match = await store.wait(KEYS, more_than=0, timeout_s=0)
        assert match.num_chunks == 0
        assert world.stats().read_leases == 1
        await asyncio.sleep(4.0)  # a server that was late is left alone for a moment
        assert world.stats().read_leases == 0
        await world.aclose()

    run_sim(body)


@simulated
async def test_a_request_that_arrives_after_its_caller_has_gone_gets_no_lease():
    """It was on its way when the connection broke."""
    world, store, wire = await world_with()
    late: list[bytes] = []
    dispatch = wire._dispatch

    async def hold(path, body):
        if path.endswith("/wait") and not late:
            late.append(body)
            await asyncio.Event().wait()
        return await dispatch(path, body)

    wire._dispatch = hold
    waiting = asyncio.create_task(store.wait(KEYS, more_than=0, timeout_s=5))
    await asyncio.sleep(0.1)
    waiting.cancel()
    await asyncio.sleep(0.1)
    await world.core.dispatch("/v1/objects/wait", late[0])
    assert world.stats().read_leases == 0
    assert world.state.counters["leases_given_back_unseen"] == 1
    await world.aclose()


@simulated
async def test_many_that_end_together_are_given_back_in_few_calls_and_none_is_left():
    world, store, wire = await world_with(max_background_tasks=4)
    wire.after["wait"] = asyncio.Event()
    waiting = [asyncio.create_task(store.wait(KEYS, more_than=0, timeout_s=5)) for _ in range(300)]
    matches = [await store.match(KEYS, timeout_s=5) for _ in range(300)]
    await asyncio.sleep(0.1)
    assert world.stats().read_leases == 600
    for task in waiting:
        task.cancel()
    for match in matches:
        store.release_soon(match)
    await asyncio.sleep(0.1)
    assert world.stats().read_leases == 0 == store.counters()["left_to_expire"]
    assert wire.calls.count("release") <= 3
    await world.aclose()


@simulated
async def test_what_cannot_be_given_back_for_a_while_is_given_back_later_and_then_left_to_expire():
    world, store, wire = await world_with()
    for outage_s, left in ((1.0, 0), (30.0, 0), (90.0, 1)):
        match = await store.match(KEYS, timeout_s=5)
        wire.down.add("release")
        store.release_soon(match)
        await asyncio.sleep(outage_s)
        wire.down.clear()
        await asyncio.sleep(2.0)
        assert store.counters()["left_to_expire"] == left
    assert world.stats().read_leases == 0
    await world.aclose()


@simulated
async def test_reservations_that_cannot_be_given_back_for_a_while_are_not_forgotten():
    """However many there are, they cost one call at a time."""
    world, store, wire = await world_with(max_background_tasks=4)
    sessions = [await store.begin_put([ChunkKey(bytes([n]) * 16)], prefer_segment=None, timeout_s=5) for n in range(50)]
    wire.down |= {"abort", "release"}
    for session in sessions:
        await session.aclose()
    await asyncio.sleep(30.0)
    assert world.stats().reservations == 50
    wire.down.clear()
    calls = wire.calls.count("abort")
    await asyncio.sleep(3.0)
    assert world.stats().reservations == 0 == store.counters()["left_to_expire"]
    assert wire.calls.count("abort") == calls + 1
    await world.aclose()


@simulated
async def test_of_a_server_that_has_not_said_its_version_nothing_is_taken_that_could_not_be_given_back():
    """A node that starts while it hangs: when it goes on it grants nothing for callers that are gone."""
    world = World()
    world.use(LoopClock(asyncio.get_running_loop()))
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    for name in ("nodes", "match", "reserve", "wait"):
        wire.before[name] = asyncio.Event()
    for _ in range(3):
        began = asyncio.get_running_loop().time()
        matches = await asyncio.gather(*(store.match(KEYS, timeout_s=5) for _ in range(9)))
        await asyncio.sleep(0.5)  # the prompt is computed meanwhile
        session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=5)
        assert not any(match.num_chunks for match in matches) and not session.wants(KEYS[0])
        assert asyncio.get_running_loop().time() - began <= 2.6, "all together cost one call its limit"
        await session.aclose()
        await asyncio.sleep(3.0)
    assert set(wire.calls) == {"nodes"} and len(wire.calls) == 3
    for gate in wire.before.values():
        gate.set()
    await put(store)
    assert world.stats().reservations == world.stats().read_leases == 0
    await world.aclose()


@simulated
async def test_a_server_that_knows_no_names_is_sent_none():
    world, store, wire = await world_with()
    store._placement._metadata._protocol = 3
    match = await store.match(KEYS, timeout_s=5)
    with store._placement.renewing(match):
        await asyncio.sleep(3 * LEASE_S)
    assert "renew" not in wire.calls and world.stats().read_leases == 0
    wire.after["wait"] = asyncio.Event()
    waiting = asyncio.create_task(store.wait(KEYS, more_than=0, timeout_s=5))
    await asyncio.sleep(0.1)
    waiting.cancel()
    await asyncio.sleep(0.1)
    assert "release" not in wire.calls and world.stats().read_leases == 1
    await world.aclose()


# --- who only looks ------------------------------------------------------------------------------------------------


@simulated
async def test_who_only_looks_takes_no_lease():
    world, store, wire = await world_with()
    assert (await store.match(KEYS, timeout_s=5, leased=False)).num_chunks == 3
    match = await store.wait(KEYS, more_than=0, timeout_s=5, leased=False)
    assert (match.num_chunks, match.lease) == (3, None)
    assert world.stats().read_leases == 0
    await store.release(match)
    assert "release" not in wire.calls
    await world.aclose()


@simulated
async def test_a_commit_of_a_writer_that_was_given_up_is_not_stored():
    world, store, _ = await world_with()
    session = await store.begin_put(KEYS[:1], prefer_segment=None, timeout_s=5)
    assert session.complete
    await session.aclose()
    key = bytes(16)
    session = await store.begin_put([key], prefer_segment="b.1", timeout_s=5)
    assert await session.write(key, 4, [memoryview(bytes(1000))], timeout_s=5)
    world.state._membership.drop(world.state._nodes["a"], world.clock.now())
    assert await session.commit(timeout_s=5) == []
    assert session.stale and store.counters()["commits_refused"] == 1
    await session.aclose()
    await world.aclose()
