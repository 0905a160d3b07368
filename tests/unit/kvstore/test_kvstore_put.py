import asyncio

import pytest
from support.store_fakes import KEYS, SPEC, get, key, payload, put, views

from kvcore.clock import ManualClock
from kvcore.config.schema import StoreConfig
from kvcore.errors import SegmentUnknownError
from kvstore.chunk_format import HEADER_BYTES, parse
from kvstore.manifest import scan
from kvstore.types import GetOutcome
from metadata_server.messages import ReplicaIds
from transfer.inproc import InprocFault, InprocTransfer

# --- what ends badly ---------------------------------------------------------------------------------------------


async def test_a_failed_write_gives_its_reservation_back_and_the_others_go_on(world):
    async def fail(direction, op):
        return InprocFault(SegmentUnknownError("gone"), 200) if op.offset == 0 else None

    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, fail))
    assert await put(store) == KEYS[1:]
    await store.aclose()
    assert world.stats().reservations == 0
    assert store.counters()["writes_failed"] == 1


async def test_a_write_cancelled_midway_leaves_no_reservation(world):
    begun = asyncio.Event()

    async def hang(direction, op):
        begun.set()
        await asyncio.Event().wait()

    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, hang))
    task = asyncio.create_task(put(store))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.aclose()
    assert world.stats().reservations == 0


async def test_closing_waits_for_a_write_under_way_before_its_place_is_given_back(world):
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def hang(direction, op):
        begun.set()
        await go_on.wait()

    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory, hang))
    session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=5)
    write = asyncio.create_task(session.write(KEYS[0], 4, views(0), timeout_s=5))
    await begun.wait()
    close = asyncio.create_task(session.aclose())
    await asyncio.sleep(0)
    assert "abort" not in wire.calls
    assert not session.wants(KEYS[1])
    go_on.set()
    await close
    assert await write is False
    await store.aclose()
    assert world.stats().reservations == 0


async def test_closing_goes_on_although_the_closer_is_cancelled(world):
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=5)
    wire.before["abort"] = asyncio.Event()
    close = asyncio.create_task(session.aclose())
    await wire.arrived["abort"].wait()
    close.cancel()
    with pytest.raises(asyncio.CancelledError):
        await close
    wire.before["abort"].set()
    await store.aclose()
    assert world.stats().reservations == 0


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_reserve_cancelled_midway_leaves_no_reservation(world, when):
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    getattr(wire, when)["reserve"] = gate = asyncio.Event()
    task = asyncio.create_task(store.begin_put(KEYS, prefer_segment=None, timeout_s=5))
    await wire.arrived["reserve"].wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await store.aclose()
    assert world.stats().reservations == 0


async def test_a_match_cancelled_midway_leaves_no_lease(world):
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    await put(store)
    wire.after["match"] = gate = asyncio.Event()
    task = asyncio.create_task(store.match(KEYS, timeout_s=5))
    await wire.arrived["match"].wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.set()
    await store.aclose()
    assert "release" in wire.calls
    assert world.stats().read_leases == 0


async def test_a_refused_commit_is_counted_and_not_visible(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=5)
    for number, wanted in enumerate(KEYS):
        await session.write(wanted, 4, views(number), timeout_s=5)
    (first,) = world.state._index.refs(world.state._index.writing[KEYS[0]])
    lost = ReplicaIds(node_id="a", incarnation=1, replica_ids=[first.id])
    world.state.abort(lost, world.clock.now())
    assert await session.commit(timeout_s=5) == KEYS[1:]
    assert await session.commit(timeout_s=5) == []
    await session.aclose()
    assert store.counters()["commits_refused"] == 1


async def test_a_full_store_grants_what_fits_and_declines_the_rest(world):
    world.add_node("a", size_bytes=2 * 4096)
    store, _ = world.store("a", InprocTransfer(world.memory))
    assert await put(store) == KEYS[:2]
    assert store.counters()["declined_full"] == 1


async def test_no_byte_is_written_once_a_reservation_has_nearly_run_out(world):
    world.use(ManualClock())
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory), config=StoreConfig(reserve_ttl_s=10))
    session = await store.begin_put(KEYS, prefer_segment=None, timeout_s=5)
    world.clock.advance(8.9)
    assert await session.write(KEYS[0], 4, views(0), timeout_s=5)
    world.clock.advance(0.2)
    assert not session.wants(KEYS[1])
    assert not await session.write(KEYS[1], 4, views(1), timeout_s=5)
    await session.aclose()
    assert store.counters()["writes_expired"] == 1
    assert len(session.moved) == 1


async def test_several_writers_of_one_key_do_not_hurt_each_other(world):
    world.add_node("a")
    world.add_node("b")
    stores = [world.store(node, InprocTransfer(world.memory))[0] for node in ("a", "b", "a")]
    sessions = [await store.begin_put(KEYS[:1], prefer_segment=None, timeout_s=5) for store in stores]
    assert [session.wants(KEYS[0]) for session in sessions] == [True, True, False]
    for session in sessions[:2]:
        assert await session.write(KEYS[0], 4, views(0), timeout_s=5)
        assert not await session.write(KEYS[0], 4, views(0), timeout_s=5)
        assert await session.commit(timeout_s=5) == KEYS[:1]
    late = await stores[2].begin_put(KEYS[:1], prefer_segment=None, timeout_s=5)
    assert late.complete == set(KEYS[:1])
    for session in [*sessions, late]:
        await session.aclose()
    assert stores[2].counters()["declined_busy"] == 1
    assert (await get(stores[2], KEYS[:1])) == ([GetOutcome.OK], [payload(0)])


async def test_a_payload_of_another_size_is_the_callers_error(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    async with await store.begin_put(KEYS, prefer_segment=None, timeout_s=5) as session:
        with pytest.raises(ValueError, match="1000"):
            await session.write(KEYS[0], 4, views(0)[:1], timeout_s=5)


@pytest.mark.parametrize("size", [0, SPEC.chunk_bytes + 1])
async def test_no_chunk_is_empty_or_longer_than_a_full_one(world, size):
    world.add_node("a")
    store, wire = world.store("a", InprocTransfer(world.memory))
    with pytest.raises(ValueError, match=f"1 to 1000 bytes, not {size}"):
        await store.begin_put(KEYS, prefer_segment=None, timeout_s=5, sizes={KEYS[2]: size})
    assert not wire.calls


async def test_a_short_chunk_takes_a_payload_of_its_own_size_and_no_other(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    sizes = {KEYS[1]: 300, KEYS[2]: 5}  # the last is not asked for
    async with await store.begin_put(KEYS[:2], prefer_segment=None, timeout_s=5, sizes=sizes) as session:
        with pytest.raises(ValueError, match="300"):
            await session.write(KEYS[1], 2, views(1), timeout_s=5)
        with pytest.raises(ValueError, match="1000"):
            await session.write(KEYS[0], 4, views(0)[:1], timeout_s=5)


async def test_a_prompts_tail_goes_beside_its_full_chunks_and_comes_back(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    async with await store.begin_put(KEYS[:2], prefer_segment=None, timeout_s=5, sizes={KEYS[1]: 300}) as session:
        assert await session.write(KEYS[0], 4, views(0), timeout_s=5)
        assert await session.write(KEYS[1], 1, views(1)[:1], timeout_s=5)
        assert await session.commit(timeout_s=5) == KEYS[:2]
    assert [move.num_bytes for move in session.moved] == [HEADER_BYTES + 1000, HEADER_BYTES + 300]
    match = await store.match(KEYS, timeout_s=5)
    into = [[memoryview(bytearray(1000))], [memoryview(bytearray(100)), memoryview(bytearray(200))]]
    result = await store.get_into(match, 0, into, timeout_s=5)
    await store.release(match)
    assert result.outcomes == [GetOutcome.OK] * 2
    assert [b"".join(chunk) for chunk in into] == [payload(0), payload(1)[:300]]
    ref = world.replicas(KEYS[1])[0].ref
    header = parse(world.memory["a.1"][ref.offset :])
    assert header is not None and (header.token_count, header.payload_length) == (1, 300)


async def test_a_short_chunk_is_found_again_in_the_segment(world):
    segment = world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    async with await store.begin_put(KEYS[:2], prefer_segment=None, timeout_s=5, sizes={KEYS[0]: 300}) as session:
        assert await session.write(KEYS[0], 1, views(0)[:1], timeout_s=5)
        assert await session.write(KEYS[1], 4, views(1), timeout_s=5)
        await session.commit(timeout_s=5)
    world.restart_metadata(epoch="2", first_generation=2 << 20)
    entries = scan(world.memory["a.1"], SPEC.fingerprint, verify_payload=True)
    assert {entry.key: entry.length - HEADER_BYTES for entry in entries} == {KEYS[0]: 300, KEYS[1]: 1000}
    world.register(segment, entries)
    match = await store.match(KEYS[:2], timeout_s=5)
    await store.release(match)
    assert match.num_chunks == 2


async def test_buffers_of_another_size_than_the_chunks_are_a_miss(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    async with await store.begin_put(KEYS[:1], prefer_segment=None, timeout_s=5, sizes={KEYS[0]: 300}) as session:
        assert await session.write(KEYS[0], 1, views(0)[:1], timeout_s=5)
        await session.commit(timeout_s=5)
    assert (await get(store, KEYS[:1]))[0] == [GetOutcome.MALFORMED]


async def test_a_metadata_server_that_began_anew_refuses_old_reservations_and_learns_what_is_there(world):
    segment = world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    await put(store, KEYS[:2])
    session = await store.begin_put(KEYS[2:], prefer_segment=None, timeout_s=5)
    assert await session.write(KEYS[2], 4, views(2), timeout_s=5)
    world.restart_metadata(epoch="2", first_generation=2 << 20)
    assert await get(store) == ([], [])
    world.register(segment, scan(world.memory["a.1"], SPEC.fingerprint))
    assert await session.commit(timeout_s=5) == []
    await session.aclose()
    assert await get(store) == ([GetOutcome.OK] * 3, [payload(number) for number in (0, 1, 2)])


async def test_a_small_wished_segment_beside_a_large_one_keeps_every_prompt_and_readers_find_them(world):
    world.add_node("p", 1 << 20)
    small = world.add_node("d", 4 * 4096)
    writer, _ = world.store("p", InprocTransfer(world.memory))
    reader, _ = world.store("d", InprocTransfer(world.memory))
    prompts = [[key(100 * prompt + chunk) for chunk in range(3)] for prompt in range(1, 11)]
    for prompt in prompts:
        assert await put(writer, prompt, prefer=small.id) == prompt
    for prompt in prompts:
        outcomes, read = await get(reader, prompt)
        assert outcomes == [GetOutcome.OK] * 3 and read == [payload(number) for number in range(3)]
    used = {segment.segment.id: segment.num_replicas for segment in world.stats().segments}
    assert used == {"d.1": 3, "p.1": 27} and not world.stats().counters["evicted"]
