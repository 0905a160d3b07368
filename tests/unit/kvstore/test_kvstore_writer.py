"""A batch of chunks in one write, hashed while it passes: header, payload, and the true header at the end."""

import asyncio
import dataclasses

import pytest
from support.chunk_attacks import CLUSTER
from support.store_fakes import KEYS, get, payload, views

from kvcore.clock import ManualClock
from kvcore.config.schema import StoreConfig
from kvcore.errors import PeerUnreachableError, SegmentUnknownError
from kvstore.chunk_format import HEADER_BYTES, checksum, parse
from kvstore.integrity.checks import Integrity
from kvstore.limits import StoreLimits
from kvstore.manifest import scan
from kvstore.put_session import PutChunk, PutSession
from kvstore.types import GetOutcome
from transfer.inproc import InprocFault, InprocTransfer

ALL = [PutChunk(key, 4, views(number)) for number, key in enumerate(KEYS)]


class Silent(InprocTransfer):
    """Shows nothing of what passes, as most transports."""

    async def write(self, ops, timeout_s):
        return await super().write([dataclasses.replace(op, on_part=None) for op in ops], timeout_s)


class Half(InprocTransfer):
    """Shows what passes of the first op of each batch alone."""

    async def write(self, ops, timeout_s):
        rest = [dataclasses.replace(op, on_part=None) for op in ops[1:]]
        return await super().write([*ops[:1], *rest], timeout_s)


@pytest.fixture(autouse=True)
def any_batch_is_large(world):
    world.limits = StoreLimits(hash_first_bytes=0)


@pytest.fixture(autouse=True, params=["checksum", "mac"])
def sealed(world, request):
    world.integrity = Integrity(request.param, CLUSTER)


async def begin(store, prefer: str | None = None) -> PutSession:
    return await store.begin_put(KEYS, prefer_segment=prefer, timeout_s=5)


# --- what ends badly ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [InprocTransfer, Silent])
async def test_a_chunk_whose_payload_did_not_land_gets_no_true_header_and_the_others_go_on(world, transport):
    async def fail(direction, op):
        return InprocFault(SegmentUnknownError("gone"), 200) if op.offset == 0 and op.num_bytes > HEADER_BYTES else None

    world.add_node("a")
    store, _ = world.store("a", transport(world.memory, fail))
    async with await begin(store) as session:
        assert await session.write_batch(ALL, timeout_s=5) == [False, True, True]
        assert await session.commit(timeout_s=5) == KEYS[1:]
    await store.aclose()
    header = parse(world.memory["a.1"])
    assert header is not None and header.key == KEYS[0] and header.checksum == 0
    assert world.stats().reservations == 0
    assert store.counters()["writes_failed"] == 1
    assert [entry.key for entry in scan(world.memory["a.1"], verify_payload=True)] == KEYS[:0:-1]


async def test_a_failure_that_pauses_the_way_to_a_segment_does_not_fail_what_has_landed_there(world):
    async def fail(direction, op):
        return InprocFault(PeerUnreachableError("gone")) if op.offset == 0 else None

    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, fail))
    async with await begin(store) as session:
        assert await session.write_batch(ALL, timeout_s=5) == [False, True, True]
        assert await session.commit(timeout_s=5) == KEYS[1:]


async def test_a_header_that_did_not_land_is_a_write_that_failed(world):
    async def fail(direction, op):
        return InprocFault(PeerUnreachableError("gone")) if op.num_bytes == HEADER_BYTES else None

    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, fail))
    async with await begin(store) as session:
        assert await session.write_batch(ALL, timeout_s=5) == [False] * 3
        assert session.moved == []
    await store.aclose()
    assert store.counters()["writes_failed"] == 3
    assert world.stats().reservations == 0


async def test_a_payload_under_way_is_not_taken_for_what_lay_there_before_nor_for_whole(world):
    begun, go_on = asyncio.Event(), asyncio.Event()
    hanging = False

    async def hang(direction, op):
        if hanging and op.num_bytes == HEADER_BYTES:
            begun.set()
            await go_on.wait()

    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, hang), config=StoreConfig(max_replicas=1))
    async with await begin(store) as session:
        assert await session.write_batch(ALL[:1], timeout_s=5) == [True]
        assert await session.commit(timeout_s=5) == KEYS[:1]
        lying_here = world.replicas(KEYS[0])[0].ref
        hanging = True
        write = asyncio.create_task(session.write_batch(ALL[1:], timeout_s=5))
        await begun.wait()
        entries = {entry.key: entry for entry in scan(world.memory["a.1"])}
        assert entries.keys() == set(KEYS)
        assert [entry.key for entry in scan(world.memory["a.1"], verify_payload=True)] == KEYS[:1]
        assert entries[KEYS[0]].generation == lying_here.generation
        go_on.set()
        assert await write == [True, True]
    assert len(scan(world.memory["a.1"], verify_payload=True)) == 3


async def test_no_header_follows_once_the_reservation_has_nearly_run_out(world):
    async def slow(direction, op):
        if op.offset == 0 and op.num_bytes > HEADER_BYTES:
            world.clock.advance(9.1)

    world.use(ManualClock())
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, slow), config=StoreConfig(reserve_ttl_s=10))
    session = await begin(store)
    assert await session.write_batch(ALL[:1], timeout_s=60) == [False]
    await session.aclose()
    assert store.counters()["writes_expired"] == 1
    header = parse(world.memory["a.1"])
    assert header is not None and header.checksum == 0


@pytest.mark.parametrize("transport", [InprocTransfer, Silent])
async def test_a_batch_cancelled_midway_leaves_no_reservation(world, transport):
    begun = asyncio.Event()

    async def hang(direction, op):
        if op.offset:
            begun.set()
            await asyncio.Event().wait()

    world.add_node("a")
    store, _ = world.store("a", transport(world.memory, hang))
    session = await begin(store)
    write = asyncio.create_task(session.write_batch(ALL, timeout_s=5))
    await begun.wait()
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    await session.aclose()
    await store.aclose()
    assert world.stats().reservations == 0


async def test_a_wrong_size_is_the_callers_error_before_anything_is_written(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    async with await begin(store) as session:
        with pytest.raises(ValueError, match="1000"):
            await session.write_batch([*ALL[:2], PutChunk(KEYS[2], 4, views(2)[:1])], timeout_s=5)
        assert all(session.wants(key) for key in KEYS)
    assert bytes(world.memory["a.1"]).count(0) == world.memory["a.1"].nbytes


async def test_a_segment_that_hangs_does_not_hold_up_another(world):
    hung = asyncio.Event()

    async def hang(direction, op):
        if op.segment.id == "b.1":
            hung.set()
            await asyncio.Event().wait()

    world.add_node("a", size_bytes=4096)
    world.add_node("b")
    store, _ = world.store("a", InprocTransfer(world.memory, hang))
    async with await begin(store, prefer="a.1") as session:
        assert await session.write_batch(ALL, timeout_s=0.05) == [True, False, False]
        assert hung.is_set()
        assert await session.commit(timeout_s=5) == KEYS[:1]


# --- what ends well ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [InprocTransfer, Silent, Half])
async def test_a_batch_is_whole_whatever_its_transport_shows(world, transport):
    world.add_node("a")
    store, _ = world.store("a", transport(world.memory))
    for _ in range(2):  # what a transport shows is learned the first time
        async with await begin(store) as session:
            if not session.complete:
                assert await session.write_batch(ALL, timeout_s=5) == [True] * 3
                assert await session.commit(timeout_s=5) == KEYS
                assert [move.num_bytes for move in session.moved] == [3 * (HEADER_BYTES + 1000)]
        assert await get(store) == ([GetOutcome.OK] * 3, [payload(number) for number in range(3)])
    ref = world.replicas(KEYS[2])[0].ref
    header = parse(world.memory["a.1"][ref.offset :])
    assert header is not None and header.checksum == checksum(views(2))


async def test_what_is_not_wanted_is_left_out_and_a_key_is_written_once(world):
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    async with await store.begin_put(KEYS[:2], prefer_segment=None, timeout_s=5) as session:
        assert await session.write(KEYS[0], 4, views(0), timeout_s=5)
        assert await session.write_batch([ALL[0], ALL[1], ALL[2]], timeout_s=5) == [False, True, False]
        assert await session.write_batch([], timeout_s=5) == []
        assert await session.commit(timeout_s=5) == KEYS[:2]


async def test_a_transport_that_shows_nothing_is_hashed_beside_from_then_on(world):
    world.add_node("a")
    store, _ = world.store("a", Silent(world.memory))
    writes = store._put_context.writer
    for number, key in enumerate(KEYS):
        async with await store.begin_put([key], prefer_segment=None, timeout_s=5) as session:
            assert await session.write(key, 4, views(number), timeout_s=5)
            await session.commit(timeout_s=5)
        assert writes._silent == {"inproc"}
    assert (await get(store))[0] == [GetOutcome.OK] * 3
