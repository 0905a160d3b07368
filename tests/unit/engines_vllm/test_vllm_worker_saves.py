"""Saves of the worker half: a chunk in the store holds what its blocks held when it was ordered, or is not there."""

import pytest
from support.vllm_kv import CheckedStreams
from support.vllm_worker import CHUNK, NUM_BLOCKS, PLACES, idle, place, shared_world, stored

from engines.vllm.connector.blocks.device_blocks import DeviceBlocks
from kvcore.chunk_keys import owner_of, rank_key
from kvstore.chunk_format import HEADER_BYTES, parse


@pytest.fixture
def rig():
    with shared_world() as rig:
        yield rig


@pytest.fixture
def world(rig):
    return rig[0]


@pytest.fixture
def engine(rig):
    return rig[1]("a")


# --- failures of the store -----------------------------------------------------------------------------------------


def test_a_store_that_is_full_takes_what_fits_and_the_request_is_sent():
    with shared_world(segment_bytes=2 * 4096) as (world, make):
        engine = make("a")
        engine.saved("p", *(place(n, n) for n in range(1, 8)))
        assert engine.counters()["chunks_stored"] == 4  # of both nodes
        assert engine.counters()["save_declined"] == 3
        assert world.state.num_objects == 4


def test_the_first_chunks_are_to_be_had_while_the_last_are_written(world, rig, monkeypatch):
    places = [place(number, 2 * number, 2 * number + 1) for number in range(7)]
    written = 0

    async def fault(direction, op):
        nonlocal written
        if direction == "write":
            if written == 4:
                await world.gate("fifth").passed()
            written += 1

    monkeypatch.setattr(world, "fault", fault)  # before an engine takes it
    world.gate("fifth").close()
    engine = rig[1]("a")
    engine.save("p", *places)
    engine.until(lambda: all(world.replicas(one.key) for one in places[:4]))
    assert not any(world.replicas(one.key) for one in places[4:])
    engine.step({"p"})
    world.gate("fifth").open()
    idle(engine)
    assert all(world.replicas(one.key) for one in places)


@pytest.mark.parametrize("what", ["", "reserve", "commit"])
def test_without_a_metadata_server_nothing_is_stored_and_the_request_is_sent(world, engine, what):
    world.down.add(what)
    engine.saved("p", *PLACES)
    assert [stored(world, number) for number in range(3)] == [None] * 3
    assert engine.counters().get("chunks_stored", 0) == 0


def test_an_error_of_ours_ends_its_save_alone(world, rig):
    class Broken:
        def __init__(self, store):
            self._store = store
            self.broken = True

        async def begin_put(self, keys, **how):
            if self.broken:
                self.broken = False
                raise RuntimeError("a bug")
            return await self._store.begin_put(keys, **how)

        def __getattr__(self, name):
            return getattr(self._store, name)

    engine = rig[1]("a", wrap=Broken)
    engine.save("p", PLACES[0])
    engine.until(lambda: engine.counters().get("save_failed") == 1)
    engine.save("p", PLACES[1], first_chunk=1)
    engine.step({"p"})
    engine.until(lambda: engine.sent == ["p"])
    engine.saved("q", *PLACES)
    assert stored(world, 0) is not None


def test_the_store_is_told_whose_chunks_are_saved(rig):
    told = []

    class Told:
        def __init__(self, store):
            self._store = store

        async def begin_put(self, keys, **how):
            told.append(how["owner"])
            return await self._store.begin_put(keys, **how)

        def __getattr__(self, name):
            return getattr(self._store, name)

    rig[1]("a", wrap=Told).saved("p", *PLACES, owner=owner_of(b"tenant"))
    assert told == [owner_of(b"tenant")]


def test_the_store_is_told_whose_chunks_are_loaded(rig):
    told = []

    class Told:
        def __init__(self, store):
            self._store = store

        async def get_into(self, match, start, buffers, **how):
            told.append(how["owner"])
            return await self._store.get_into(match, start, buffers, **how)

        def __getattr__(self, name):
            return getattr(self._store, name)

    rig[1]("a").saved("p", *PLACES)
    rig[1]("b", wrap=Told).loaded("q", *PLACES, owner=owner_of(b"tenant"))
    assert told == [owner_of(b"tenant")]


def test_an_order_of_unknown_blocks_ends_its_save_alone(world, engine):
    engine.saved("p", place(7, 0, NUM_BLOCKS))
    engine.saved("q", *PLACES)
    assert world.state.num_objects == 3


# --- what is stored ------------------------------------------------------------------------------------------------


def test_a_tail_has_its_own_size_and_number_of_tokens(world, engine):
    engine.saved("p", *PLACES)
    headers = [world.replicas(saved.key)[0].ref for saved in PLACES]
    parsed = [parse(world.memory[ref.segment_id][ref.offset :]) for ref in headers]
    size = engine.blocks.block_bytes
    assert [(header.token_count, header.payload_length) for header in parsed] == [
        (CHUNK, 2 * size),
        (CHUNK, 2 * size),
        (3, size),
    ]
    assert stored(world, 2) == engine.content(4)


def test_room_for_a_whole_prompt_is_asked_for_once_and_chunks_go_as_they_come(world, engine):
    reserve = tuple((saved.key, len(saved.block_ids)) for saved in PLACES)
    for number, saved in enumerate(PLACES):
        engine.save("p", saved, first_chunk=number, reserve=reserve if number == 0 else (), prefer_segment="b.1")
        engine.until(lambda number=number: stored(world, number) is not None)
    engine.step({"p"})
    engine.until(lambda: engine.sent == ["p"])
    assert world.calls.count("reserve") == 1
    assert {world.replicas(saved.key)[0].ref.segment_id for saved in PLACES} == {"b.1"}


def test_output_beyond_the_prompt_gets_room_of_its_own(world, engine):
    engine.save("p", PLACES[0])
    engine.save("p", PLACES[1], first_chunk=1, reserve=())
    engine.save("p", PLACES[2], first_chunk=2, reserve=())
    engine.step({"p"})
    engine.until(lambda: engine.sent == ["p"])
    assert all(stored(world, number) is not None for number in range(3))


def test_what_the_store_has_is_not_written_again(world, engine):
    engine.saved("p", *PLACES[:2])
    engine.fill(0, 1, number=5.0)
    engine.saved("q", *PLACES)
    assert world.replicas(PLACES[0].key)[0].ref.generation < world.replicas(PLACES[2].key)[0].ref.generation
    assert stored(world, 0) != engine.content(0, 1)
    assert (engine.counters()["chunks_stored"], engine.counters().get("save_declined", 0)) == (3, 0)


def test_other_ranks_have_other_keys(world, rig):
    ranks = [rig[1]("a", rank=rank, tp_size=2) for rank in range(2)]
    for rank in ranks:
        rank.saved("p", PLACES[2])
    assert stored(world, 2) == ranks[0].content(4)
    (other,) = world.replicas(rank_key(PLACES[2].key, 1))
    offset = other.ref.offset + HEADER_BYTES
    assert bytes(world.memory[other.ref.segment_id][offset : offset + ranks[1].blocks.block_bytes]) == ranks[1].content(
        4
    )


def test_a_save_from_a_device_waits_for_the_step_that_computes_its_blocks(world, rig):
    streams = CheckedStreams()
    engine = rig[1]("a", make_blocks=lambda layout: DeviceBlocks(layout, streams))
    streams.computing.append(lambda: engine.fill(0, 1, number=2.5))
    engine.saved("p", PLACES[0])
    assert engine.holds(0, 2.5) and engine.holds(1, 2.5)
    assert stored(world, 0) == engine.content(0, 1)


def test_device_and_host_memory_share_their_chunks(rig):
    device = rig[1]("a", make_blocks=lambda layout: DeviceBlocks(layout, CheckedStreams()))
    host = rig[1]("b")
    device.saved("p", *PLACES)
    assert host.loaded("d", *PLACES) == []
    assert host.content(*range(5)) == device.content(*range(5))
    assert device.loaded("d", place(1, 8, 9), place(2, 10, 11)) == []
    assert device.content(8, 9, 10, 11) == host.content(0, 1, 2, 3)


# --- when a request is sent ----------------------------------------------------------------------------------------


def test_a_request_is_sent_once_it_has_finished_and_all_is_committed(world, engine):
    world.gate("commit").close()
    engine.save("p", *PLACES)
    world.gate("commit").wait_reached()
    engine.step({"p"})
    engine.save("q", place(9, 8))
    engine.step({"q", "r"})
    assert engine.sent == []
    world.gate("commit").open()
    engine.until(lambda: sorted(engine.sent) == ["p", "q"])
    engine.step()
    assert sorted(engine.sent) == ["p", "q"]


def test_a_request_whose_saves_ended_before_it_finished_is_sent_after_that(world, engine):
    engine.save("p", *PLACES)
    engine.until(lambda: stored(world, 2) is not None)
    assert engine.sent == []
    engine.step({"p"})
    engine.until(lambda: engine.sent == ["p"])
