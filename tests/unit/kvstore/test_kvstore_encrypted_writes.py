"""A batch of encrypted chunks in one write, by way of the store's own memory; and how readers open them in place."""

import asyncio
import dataclasses
import threading

import pytest
from support.chunk_attacks import CLUSTER
from support.store_fakes import CHUNK_BYTES, KEYS, SPEC, get, key, payload, views

from kvcore.clock import ManualClock
from kvcore.config.schema import StoreConfig
from kvcore.errors import PeerUnreachableError, SegmentUnknownError
from kvstore.checksums import run_sized
from kvstore.chunk_format import HEADER_BYTES, checksum, parse
from kvstore.integrity.checks import Integrity
from kvstore.integrity.scratch import Scratch
from kvstore.limits import StoreLimits
from kvstore.manifest import scan
from kvstore.put_session import PutChunk, PutSession
from kvstore.types import GetOutcome
from transfer.inproc import InprocFault, InprocTransfer

ALL = [PutChunk(name, 4, views(number)) for number, name in enumerate(KEYS)]
ONE_EACH = StoreLimits(hash_first_bytes=0, scratch_slot_bytes=1, scratch_bytes=1)
"""A slot holds one chunk, and there are two."""


class Silent(InprocTransfer):
    """Shows nothing of what passes."""

    async def read(self, ops, timeout_s):
        return await super().read([dataclasses.replace(op, on_part=None) for op in ops], timeout_s)


@pytest.fixture(autouse=True)
def encrypted(world):
    world.integrity = Integrity("mac", CLUSTER, encrypt=True)
    world.limits = ONE_EACH


async def begin(store, prefer: str | None = None, keys=KEYS) -> PutSession:
    return await store.begin_put(keys, prefer_segment=prefer, timeout_s=5)


def free_slots(store) -> int:
    return len(store._scratch._free)


# --- what ends badly ---------------------------------------------------------------------------------------------


async def test_a_chunk_that_did_not_land_is_given_back_and_the_others_go_on(world):
    async def fail(direction, op):
        return InprocFault(SegmentUnknownError("gone"), 600) if op.offset == 0 else None

    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, fail))
    async with await begin(store) as session:
        assert await session.write_batch(ALL, timeout_s=5) == [False, True, True]
        assert await session.commit(timeout_s=5) == KEYS[1:]
    await store.aclose()
    assert world.stats().reservations == 0 and store.counters()["writes_failed"] == 1
    assert {entry.key for entry in scan(world.memory["a.1"], verify_payload=True)} == set(KEYS[1:])
    assert free_slots(store) == 2


async def test_a_segment_that_hangs_holds_up_none_of_another_and_gives_its_slots_back(world):
    hung = asyncio.Event()

    async def hang(direction, op):
        if op.segment.id == "b.1":
            hung.set()
            await asyncio.Event().wait()

    world.add_node("a")
    world.add_node("b")
    store, _ = world.store("a", InprocTransfer(world.memory, hang))
    others = [key(number) for number in range(10, 14)]
    async with await begin(store, "b.1", others) as stuck, await begin(store, "a.1") as session:
        chunks = [PutChunk(name, 4, views(number)) for number, name in enumerate(others)]
        writing = asyncio.create_task(stuck.write_batch(chunks, timeout_s=60))
        await hung.wait()
        assert free_slots(store) == 0
        assert await session.write_batch(ALL, timeout_s=5) == [True] * 3
        assert not writing.done()
        assert await session.commit(timeout_s=5) == KEYS
        writing.cancel()
        await asyncio.wait({writing})
    assert free_slots(store) == 2
    assert await get(store) == ([GetOutcome.OK] * 3, [payload(number) for number in range(3)])


async def test_nothing_is_written_once_the_reservation_has_nearly_run_out(world):
    async def slow(direction, op):
        world.clock.advance(9.1)

    world.use(ManualClock())
    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, slow), config=StoreConfig(reserve_ttl_s=10))
    session = await begin(store)
    written = await session.write_batch(ALL, timeout_s=60)
    await session.aclose()
    assert written == [True, False, False]
    assert store.counters()["writes_expired"] == 2


async def test_a_batch_that_is_cancelled_leaves_no_reservation_and_no_slot_taken(world):
    begun = asyncio.Event()

    async def hang(direction, op):
        begun.set()
        await asyncio.Event().wait()

    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, hang))
    session = await begin(store)
    write = asyncio.create_task(session.write_batch(ALL, timeout_s=5))
    await begun.wait()
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    await session.aclose()
    await store.aclose()
    assert world.stats().reservations == 0 and free_slots(store) == 2


async def test_a_segment_that_is_away_is_a_write_that_failed(world):
    async def fail(direction, op):
        return InprocFault(PeerUnreachableError("gone"))

    world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory, fail))
    async with await begin(store) as session:
        assert await session.write_batch(ALL, timeout_s=5) == [False] * 3
        assert session.moved == []


async def test_what_goes_over_a_callers_memory_has_ended_when_the_cancelled_caller_goes_on():
    """Else it would decrypt into blocks that are another request's by then."""
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(60)
        ended.set()

    caller = asyncio.create_task(run_sized(asyncio.to_thread, 2, work, inline_bytes=1))
    await asyncio.to_thread(begun.wait, 60)
    for _ in range(2):
        caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()


# --- what ends well ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [InprocTransfer, Silent])
@pytest.mark.parametrize("limits", [StoreLimits(), StoreLimits(hash_first_bytes=0), ONE_EACH])
async def test_a_batch_is_ciphertext_in_the_segment_and_whole_at_its_reader(world, transport, limits):
    world.limits = limits
    world.add_node("a")
    store, _ = world.store("a", transport(world.memory))
    sources = [[bytes(view) for view in chunk.payload] for chunk in ALL]
    async with await begin(store) as session:
        assert await session.write_batch(ALL, timeout_s=5) == [True] * 3
        assert await session.commit(timeout_s=5) == KEYS
        assert sum(move.num_bytes for move in session.moved) == 3 * (HEADER_BYTES + CHUNK_BYTES)
    assert sources == [[bytes(view) for view in chunk.payload] for chunk in ALL], "the caller's memory is only read"
    assert await get(store) == ([GetOutcome.OK] * 3, [payload(number) for number in range(3)])
    lying = bytes(world.memory["a.1"])
    assert not any(payload(number)[:8] in lying for number in range(1, 3))
    for number, name in enumerate(KEYS):
        place = world.replicas(name)[0].ref
        header, body = parse(lying[place.offset :]), lying[place.offset + HEADER_BYTES :][:CHUNK_BYTES]
        assert header is not None and header.encrypted and header.checksum == checksum([memoryview(body)])
        assert body != payload(number)


async def test_a_reader_goes_on_with_the_next_replica_where_the_first_was_changed(world):
    store, _ = world.store("a", InprocTransfer(world.memory))
    for node in ("a", "b"):
        world.add_node(node)
        async with await begin(store, f"{node}.1", KEYS[:1]) as session:
            if session.wants(KEYS[0]):
                assert await session.write(KEYS[0], 4, views(0), timeout_s=5)
                await session.commit(timeout_s=5)
    place = world.replicas(KEYS[0])[0].ref
    assert len(world.replicas(KEYS[0])) == 1
    world.memory[place.segment_id][place.offset + HEADER_BYTES] ^= 1
    assert (await get(store, KEYS[:1]))[0] == [GetOutcome.CHECKSUM]


async def test_a_store_without_encryption_has_no_memory_for_it_and_one_with_it_has_it_registered(world):
    registered = []

    class Registering(InprocTransfer):
        def register(self, region):
            registered.append(region)

    region = memoryview(bytearray(64))
    plain, _ = world.store("a", Registering(world.memory), integrity=Integrity())
    await plain.register(region)
    assert registered == [region] and plain._scratch is None
    store, _ = world.store("a", Registering(world.memory))
    for _ in range(2):
        await store.register(region)
    assert registered == [region, region, store._scratch.memory, region]
    assert store._scratch.slot_bytes == SPEC.chunk_bytes


def test_scratch_is_slots_and_more_where_all_are_taken():
    scratch = Scratch(100, 2)
    with scratch.slot() as one, scratch.slot() as two:
        one[:], two[:] = b"1" * 100, b"2" * 100
        with scratch.slot() as third:
            third[:] = b"3" * 100
            assert (bytes(one[:1]), bytes(two[:1]), len(third)) == (b"1", b"2", 100)
        assert repr(scratch) == "<Scratch 0 slots of 100 bytes free>"
    assert repr(scratch) == "<Scratch 2 slots of 100 bytes free>"
    assert scratch.groups("abcde", [40, 60, 1, 100, 3]) == [["a", "b"], ["c"], ["d"], ["e"]]
