import asyncio
import dataclasses

import msgspec
import pytest
from support.store_fakes import (
    CHUNK_BYTES,
    KEYS,
    SPEC,
    World,
    buffers,
    get,
    key,
    lie,
    payload,
    put,
    put_twice,
    replica,
    views,
)

from engines.jobs.context import as_moved
from kvcore.clock import ManualClock
from kvcore.errors import PeerUnreachableError, TransferTimeoutError
from kvstore.chunk_format import HEADER_BYTES
from kvstore.integrity.checks import Integrity
from kvstore.limits import StoreLimits
from kvstore.types import Direction, GetOutcome, Lease, Match
from transfer.inproc import InprocFault, InprocTransfer
from transfer.select import TransferSelector


class Silent(InprocTransfer):
    """Shows nothing of what arrives, as most transports."""

    async def read(self, ops, timeout_s):
        return await super().read([dataclasses.replace(op, on_part=None) for op in ops], timeout_s)


# --- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "outcome"),
    [(0, GetOutcome.MALFORMED), (80, GetOutcome.MALFORMED), (HEADER_BYTES + 500, GetOutcome.CHECKSUM)],
)
@pytest.mark.parametrize("transport", [InprocTransfer, Silent])
async def test_a_flipped_byte_is_a_miss_of_that_chunk_alone_and_is_reported(world, at, outcome, transport):
    world.add_node("a")
    store, _ = world.store("a", transport(world.memory))
    await put(store)
    bad = replica(world, 1)
    world.memory["a.1"][bad.offset + at] ^= 1
    outcomes, _ = await get(store)
    await store.aclose()
    assert outcomes == [GetOutcome.OK, outcome, GetOutcome.OK]
    assert [(item.replica, item.reason) for item in world.quarantined] == [(bad, outcome)]
    assert store.counters()[f"miss_{outcome}"] == 1
    assert world.replicas(KEYS[1]) == []


async def test_without_checking_a_flipped_payload_byte_passes_but_never_a_flipped_header(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory), integrity=Integrity("header"))
    await put(store)
    world.memory["a.1"][replica(world, 0).offset + HEADER_BYTES] ^= 1
    world.memory["a.1"][replica(world, 1).offset + 20] ^= 1
    assert (await get(store))[0] == [GetOutcome.OK, GetOutcome.MALFORMED, GetOutcome.OK]


async def test_a_stale_generation_is_a_miss(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    await put(store)
    lie(world, generation=77)
    assert (await get(store))[0][0] is GetOutcome.STALE


async def test_another_keys_chunk_in_the_place_is_stale(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    await put(store)
    lie(world, offset=replica(world, 1).offset)
    assert (await get(store))[0][0] is GetOutcome.STALE


async def test_a_chunk_of_other_weights_is_foreign(world):
    world.add_node("a")
    writer, _ = world.store("a", InprocTransfer(world.memory))
    await put(writer)
    reader, _ = world.store(
        "a", InprocTransfer(world.memory), spec=msgspec.structs.replace(SPEC, weights_digest="other")
    )
    assert (await get(reader))[0] == [GetOutcome.FOREIGN] * 3


async def test_a_replica_of_another_length_is_malformed_and_not_even_read(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    await put(store)
    lie(world, length=HEADER_BYTES + 999)
    outcomes, _ = await get(store)
    assert outcomes[0] is GetOutcome.MALFORMED
    assert store.moved()[1].num_bytes == 2 * (HEADER_BYTES + CHUNK_BYTES)


# --- peers that are gone or silent -------------------------------------------------------------------------------


async def test_a_segment_that_its_peer_no_longer_holds_is_unreachable_and_reported(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    await put(store)
    del world.memory["a.1"]
    assert (await get(store))[0] == [GetOutcome.UNREACHABLE] * 3
    await store.aclose()
    assert {item.reason for item in world.quarantined} == {GetOutcome.UNREACHABLE}


@pytest.mark.parametrize("error", [TransferTimeoutError("silent"), PeerUnreachableError("refused")])
async def test_a_silent_peer_is_unreachable_but_not_told_on_and_left_alone_for_a_moment(world, error):
    async def fail(direction, op):
        return InprocFault(error) if direction == "read" else None

    world.use(ManualClock())
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, fail))
    await put(store)
    assert (await get(store))[0] == [GetOutcome.UNREACHABLE] * 3
    assert world.quarantined == []
    before = store.counters()["replica_unreachable"]
    assert (await get(store))[0] == [GetOutcome.UNREACHABLE] * 3
    assert store.counters()["replica_unreachable"] == before  # not tried
    world.clock.advance(0.11)
    await get(store)
    assert store.counters()["replica_unreachable"] == before + 3


@pytest.mark.parametrize("error, late", [(TransferTimeoutError("late"), True), (PeerUnreachableError("no"), False)])
@pytest.mark.parametrize("direction", ["read", "write"])
async def test_what_was_late_as_a_whole_is_told_with_the_time_that_it_had(world, direction, error, late):
    """Else nobody learns of a way that is too slow for anything to come by it."""

    async def fail(of, op):
        return InprocFault(error) if of == direction else None

    world.use(ManualClock())
    world.add_node("a", host_id="there")
    store, _ = world.store("a", InprocTransfer(world.memory, fail))
    async with await store.begin_put(KEYS, prefer_segment="a.1", timeout_s=5) as session:
        for number, key in enumerate(KEYS):
            await session.write(key, 4, views(number), timeout_s=5)
        await session.commit(timeout_s=5)
        moved = list(session.moved)
    if direction == "read":
        match = await store.match(KEYS, timeout_s=5)
        moved = (await store.get_into(match, 0, buffers(3), timeout_s=5)).moved
        await store.release(match)
    told = [one for one in as_moved(moved) if not one.num_bytes]
    size = HEADER_BYTES + CHUNK_BYTES
    wanted = (3 if direction == "read" else 1) * size  # after its first write the way is left alone for a moment
    assert [one.late_bytes for one in told] == ([wanted] if late else [])
    assert sum(one.num_bytes for one in store.moved()) == (3 * size if direction == "read" else 0)


async def test_a_segment_that_no_transport_reaches_is_unreachable(world):
    world.add_node("a", kind="inproc")
    writer, _ = world.store("a", InprocTransfer(world.memory))
    await put(writer)
    reader, _ = world.store("a", Named("tcp", world.memory))
    assert (await get(reader))[0] == [GetOutcome.UNREACHABLE] * 3


async def test_time_that_has_run_out_reads_nothing(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    await put(store)
    assert (await get(store, timeout_s=0))[0] == [GetOutcome.UNREACHABLE] * 3


@pytest.mark.parametrize("damage", ["payload", "gone", "slow"])
async def test_a_second_replica_saves_the_read(world, damage):
    async def fault(direction, op):
        if damage == "slow" and direction == "read" and op.segment.id == "a.1":
            await asyncio.Event().wait()

    world.add_node("a")
    world.add_node("b")
    store, _ = world.store("a", InprocTransfer(world.memory, fault))
    await put_twice(store)
    if damage == "payload":
        world.memory["a.1"][replica(world).offset + HEADER_BYTES] ^= 1
    elif damage == "gone":
        del world.memory["a.1"]
    outcomes, data = await get(store, KEYS[:1], timeout_s=0.1)
    assert outcomes == [GetOutcome.OK]
    assert data == [payload(0)]
    assert store.counters().get("miss_checksum", 0) == 0


class Named(InprocTransfer):
    """An in-process transport under another name."""

    def __init__(self, kind: str, memory, fault=None) -> None:
        super().__init__(memory, fault)
        self.kind = kind


@pytest.mark.parametrize(("reader", "order"), [("a", ["a.1", "b.1"]), ("b", ["b.1", "a.1"]), ("c", ["b.1", "a.1"])])
async def test_the_own_segment_is_read_first_and_then_one_on_the_same_host(world, reader, order):
    seen = []

    async def spy(direction, op):
        if direction == "read":
            seen.append(op.segment.id)
            return InprocFault(PeerUnreachableError("no"))
        return None

    world.add_node("a", host_id="far")
    for name in ("b", "c"):
        world.add_node(name)
    store, _ = world.store(reader, InprocTransfer(world.memory, spy))
    await put_twice(store)
    assert (await get(store, KEYS[:1]))[0] == [GetOutcome.UNREACHABLE]
    assert seen == order


async def test_chunks_behind_different_transports_are_read_at_the_same_time_and_counted_apart(world):
    both = asyncio.Barrier(2)

    async def meet(direction, op):
        if direction == "read":
            await both.wait()

    world.add_node("a", size_bytes=4096, kind="shm")
    world.add_node("b", kind="tcp")
    engines = [Named(kind, world.memory, meet) for kind in ("shm", "tcp")]
    store, _ = world.store("a", TransferSelector("auto", engines))
    await put(store, KEYS[:2], prefer="a.1")
    outcomes, data = await get(store, KEYS[:2])
    assert outcomes == [GetOutcome.OK] * 2
    assert data == [payload(0), payload(1)]
    assert {(moved.transport, moved.direction) for moved in store.moved()} == {
        (transport, direction) for transport in ("shm", "tcp") for direction in Direction
    }


# --- the metadata server away -------------------------------------------------------------------------------------


async def test_metadata_away_is_an_empty_match_and_a_session_that_accepts_nothing(world):
    world.limits = StoreLimits(close_s=0.05)
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    wire.down.add("")
    assert (await store.match(KEYS, timeout_s=5)) == Match()
    assert (await store.wait(KEYS, more_than=0, timeout_s=5)) == Match()
    session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=5)
    assert not any(session.wants(wanted) for wanted in KEYS)
    assert not await session.write(KEYS[0], 4, views(0), timeout_s=5)
    assert await session.commit(timeout_s=5) == []
    await session.aclose()
    await store.release(Match(lease=Lease(4, 1.0)))
    assert store.counters()["metadata_unavailable"] == 4


async def test_metadata_that_does_not_answer_costs_no_more_than_the_callers_time(world):
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    wire.before["match"] = wire.before["reserve"] = asyncio.Event()
    assert (await store.match(KEYS, timeout_s=0.01)) == Match()
    session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=0.01)
    assert not session.wants(KEYS[0])


async def test_a_commit_that_could_not_be_asked_is_asked_again(world):
    world.use(ManualClock())
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=5)
    assert await session.write(KEYS[0], 4, views(0), timeout_s=5)
    wire.down.add("commit")
    assert await session.commit(timeout_s=5) == []
    wire.down.clear()
    world.clock.advance(1)
    assert await session.commit(timeout_s=5) == [KEYS[0]]
    await session.aclose()


async def test_what_cannot_be_given_back_is_tried_again_without_anybody_waiting(world):
    world.limits = StoreLimits(retry_pauses_s=(0.0,) * 50)
    world.use(ManualClock())
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    await put(store)
    session = await store.begin_put([key(9)], prefer_segment=None, timeout_s=5)
    match = await store.match(KEYS, timeout_s=5)
    wire.down |= {"abort", "release"}
    await store.release(match)
    await session.aclose()
    wire.down.clear()
    world.clock.advance(1)
    await store.aclose()
    assert (world.stats().read_leases, world.stats().reservations) == (0, 0)
    assert store.counters()["left_to_expire"] == 0


async def test_reports_and_give_backs_that_never_arrive_fail_nobody_and_are_counted(world):
    world.limits = StoreLimits(retry_pauses_s=(0.0, 0.0, 0.0))
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    await put(store)
    world.memory["a.1"][replica(world).offset] ^= 1
    session = await store.begin_put([key(9)], prefer_segment=None, timeout_s=5)
    wire.down |= {"quarantine", "abort", "release"}
    assert (await get(store))[0][0] is GetOutcome.MALFORMED
    await session.aclose()
    await store.aclose()
    assert store.counters()["reports_dropped"] == 1
    assert store.counters()["left_to_expire"] == 2


# --- waiting -----------------------------------------------------------------------------------------------------


async def test_waiting_ends_with_more_chunks_than_one_has(world):
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    await put(store, KEYS[:1])
    waiting = asyncio.create_task(store.wait(KEYS, more_than=1, timeout_s=5))
    await wire.arrived["wait"].wait()
    assert not waiting.done()
    await put(store, KEYS[1:2])
    match = await waiting
    assert match.num_chunks == 2
    await store.release(match)


async def test_waiting_in_vain_answers_with_what_there_is(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    await put(store, KEYS[:1])
    match = await store.wait(KEYS, more_than=1, timeout_s=0.01)
    assert match.num_chunks == 1
    await store.release(match)


async def test_a_cancelled_wait_leaves_no_waiter_and_no_lease(world):
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    waiting = asyncio.create_task(store.wait(KEYS, more_than=0, timeout_s=5))
    await wire.arrived["wait"].wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (world.stats().waiters, world.stats().read_leases) == (0, 0)


@pytest.mark.parametrize("timeout_s", [86_400.0, -0.001])
async def test_a_wait_of_any_length_is_one_that_the_server_takes(world, timeout_s):
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    waiting = asyncio.create_task(store.wait(KEYS, more_than=0, timeout_s=timeout_s))
    await wire.arrived["wait"].wait()
    await asyncio.sleep(0)
    if timeout_s > 0:
        assert not waiting.done()
        await put(store)
    match = await waiting
    assert match.num_chunks == (len(KEYS) if timeout_s > 0 else 0)
    await store.release(match)
    assert store.counters()["metadata_protocol"] == 0


# --- what works --------------------------------------------------------------------------------------------------


async def test_what_was_put_is_got_with_its_bytes_counted_both_ways(world):
    world.add_node("a")
    world.add_node("b")
    store, _ = world.store("a", InprocTransfer(world.memory))
    assert await put(store, prefer="b.1") == KEYS
    assert {replica(world, number).segment_id for number in range(3)} == {"b.1"}
    assert await get(store) == ([GetOutcome.OK] * 3, [payload(number) for number in range(3)])
    total = 3 * (HEADER_BYTES + CHUNK_BYTES)
    assert [(m.transport, m.direction, m.num_bytes) for m in store.moved()] == [
        ("inproc", Direction.PUT, total),
        ("inproc", Direction.GET, total),
    ]
    assert (store.counters()["chunks_put"], store.counters()["chunks_got"]) == (3, 3)


async def test_what_is_read_is_told_by_the_machine_that_it_lay_on(world):
    for name, host in (("a", "h"), ("b", "far"), ("c", "farther")):
        world.add_node(name, host_id=host)
    store, _ = world.store("a", InprocTransfer(world.memory))
    for number, segment in enumerate(("a.1", "b.1", "c.1")):
        async with await store.begin_put([KEYS[number]], prefer_segment=segment, timeout_s=5) as session:
            await session.write(KEYS[number], 4, views(number), timeout_s=5)
            await session.commit(timeout_s=5)
    match = await store.match(KEYS, timeout_s=5)
    result = await store.get_into(match, 0, buffers(3), timeout_s=5)
    assert result.outcomes == [GetOutcome.OK] * 3
    assert {(moved.machine, moved.num_bytes) for moved in result.moved} == {
        (host, HEADER_BYTES + CHUNK_BYTES) for host in ("h", "far", "farther")
    }
    told = {(one.machine, one.direction) for one in as_moved(result.moved)}
    assert told == {("h", "get"), ("far", "get"), ("farther", "get")}
    await store.release(match)


async def test_reading_from_the_middle_of_a_match(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    await put(store)
    match = await store.match([*KEYS, key(8)], timeout_s=5)
    assert match.num_chunks == 3
    into = buffers(2)
    assert (await store.get_into(match, 1, into, timeout_s=5)).outcomes == [GetOutcome.OK] * 2
    assert b"".join(into[0]) == payload(1)
    with pytest.raises(ValueError, match="not in a match"):
        await store.get_into(match, 2, into, timeout_s=5)
    await store.release(match)
    await store.release(match)


async def test_nothing_asked_is_nothing_done(world):
    store, wire = world.store("a", InprocTransfer(world.memory))
    assert await store.match([], timeout_s=5) == Match()
    session = await store.begin_put([], prefer_segment=None, timeout_s=5)
    await session.aclose()
    assert wire.calls == []


async def test_a_large_payload_that_was_not_shown_is_hashed_off_the_loop_and_a_small_one_on_it(world):
    world.limits = StoreLimits(inline_hash_bytes=2 * CHUNK_BYTES)
    world.add_node("a")
    taken = []
    store, _ = world.store("a", Silent(world.memory))

    async def run(function):
        taken.append(function)
        return function()

    store._reader._run_blocking = run
    await put(store)
    await get(store, KEYS[:1])
    assert taken == []
    await get(store)
    assert len(taken) == 1


async def test_a_lease_given_back_after_the_end_is_tried_once_and_leaves_no_task():
    world = World()
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    await put(store)
    match = await store.match(KEYS, timeout_s=5)
    await store.aclose()
    wire.down.add("release")
    before = asyncio.all_tasks()
    await store.release(match)
    assert asyncio.all_tasks() == before and store.counters()["left_to_expire"] == 1
