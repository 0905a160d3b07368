"""Saves of the worker half: a chunk in the store holds what its blocks held when it was ordered, or is not there."""

import threading

import pytest
from support.vllm_kv import CheckedStreams
from support.vllm_worker import CHUNK, LIMIT_S, NUM_BLOCKS, place, shared_world

from engines.vllm.connector.device_blocks import DeviceBlocks
from engines.vllm.connector.limits import ConnectorLimits
from kvcore.chunk_keys import rank_key
from kvstore.chunk_format import HEADER_BYTES, parse

PLACES = [place(1, 0, 1), place(2, 2, 3), place(3, 4, num_tokens=3)]


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


def stored(world, number: int) -> bytes | None:
    """The payload of the complete chunk with this key."""
    found = world.replicas(PLACES[number].key)
    if not found:
        return None
    ref = found[0].ref
    return bytes(world.memory[ref.segment_id][ref.offset + HEADER_BYTES : ref.offset + ref.length])


def idle(engine) -> None:
    """Until no save is under way."""
    engine.until(lambda: engine.half._jobs.num_pending_saves == 0 and not engine.half._jobs._saves)


class Waiting(threading.Thread):
    """`preempted` as vLLM's thread calls it: the test's own thread goes on."""

    def __init__(self, engine, request_id: str) -> None:
        super().__init__(target=engine.half.preempted, args=([request_id],))
        self.start()

    def ended(self) -> None:
        self.join(LIMIT_S)
        assert not self.is_alive()


# --- preemption ----------------------------------------------------------------------------------------------------


def test_preempted_waits_for_the_write_under_way_and_cancels_the_rest(world, engine):
    world.gate("write").close()
    engine.save("p", *PLACES)
    world.gate("write").wait_reached()
    before = engine.content(0, 1, 2, 3)
    waiting = Waiting(engine, "p")
    engine.until(lambda: engine.half._jobs.num_pending_saves == 2)  # the third was let go of
    assert waiting.is_alive()
    world.gate("write").open()
    waiting.ended()
    engine.fill(*range(5), number=-3.0)
    idle(engine)
    assert [stored(world, 0), stored(world, 1)] == [before[: len(before) // 2], before[len(before) // 2 :]]
    assert stored(world, 2) is None
    engine.step({"p"})
    assert engine.sent == []


def test_a_write_that_does_not_end_is_given_up_and_never_committed(world, rig):
    engine = rig[1]("a", limits=ConnectorLimits(write_ends_s=0.05))
    world.gate("write").close()
    engine.save("p", *PLACES)
    world.gate("write").wait_reached()
    engine.half.preempted(["p"])
    engine.fill(*range(5), number=-3.0)
    world.gate("write").open()
    idle(engine)
    assert [stored(world, number) for number in range(3)] == [None] * 3
    engine.until(lambda: world.stats().reservations == 0)


def test_what_was_written_before_a_preemption_is_committed_after_it(world, engine):
    world.gate("commit").close()
    engine.save("p", *PLACES)
    world.gate("commit").wait_reached()
    before = engine.content(0, 1)
    engine.half.preempted(["p"])
    engine.fill(*range(5), number=-3.0)
    world.gate("commit").open()
    idle(engine)
    assert stored(world, 0) == before


def test_a_preemption_before_room_was_given_writes_nothing(world, engine):
    world.gate("reserve").close()
    engine.save("p", *PLACES)
    world.gate("reserve").wait_reached()
    engine.half.preempted(["p"])
    engine.fill(*range(5), number=-3.0)
    world.gate("reserve").open()
    idle(engine)
    assert [stored(world, number) for number in range(3)] == [None] * 3
    engine.until(lambda: world.stats().reservations == 0)


@pytest.mark.parametrize("writing", [True, False])
def test_when_our_thread_hangs_a_preemption_goes_on_and_the_save_is_void(world, rig, writing):
    engine = rig[1]("a", limits=ConnectorLimits(preemption_s=0.05))
    hanging = threading.Event()
    if writing:
        world.gate("write").close()
        engine.save("p", *PLACES)
        world.gate("write").wait_reached()
    engine.half._post(hanging.wait, LIMIT_S)
    if writing:
        world.gate("write").open()  # what will be copied when the thread goes on is not what was ordered
    else:
        engine.save("p", *PLACES)
    engine.half.preempted(["p"])
    assert engine.counters()["preempted_failed"] == 1
    engine.fill(*range(5), number=-3.0)
    hanging.set()
    idle(engine)
    assert [stored(world, number) for number in range(3)] == [None] * 3
    engine.saved("later", *PLACES)
    assert stored(world, 0) == engine.content(0, 1)


def test_a_gather_from_the_device_ends_before_preempted_returns(world, rig):
    streams = CheckedStreams()
    engine = rig[1]("a", make_blocks=lambda layout: DeviceBlocks(layout, streams))
    before = engine.content(0, 1)
    streams.hold.clear()
    engine.save("p", *PLACES)
    assert streams.holding.wait(LIMIT_S)
    waiting = Waiting(engine, "p")
    engine.until(lambda: engine.half._jobs.num_pending_saves == 2)
    assert waiting.is_alive()
    streams.hold.set()
    waiting.ended()
    engine.fill(*range(5), number=-3.0)
    idle(engine)
    assert stored(world, 0) == before


def test_a_request_that_runs_again_saves_again_and_is_sent_once(world, engine):
    engine.save("p", PLACES[0])
    engine.half.preempted(["p"])
    engine.fill(0, 1, number=5.0)
    engine.save("p", *PLACES)
    engine.step({"p"})
    engine.until(lambda: "p" in engine.sent)
    idle(engine)
    engine.step()
    assert engine.sent == ["p"]
    assert stored(world, 1) == engine.content(2, 3)


def test_the_end_of_a_cut_save_is_not_the_end_of_the_one_after_it(world, engine):
    world.gate("commit").close()
    engine.save("p", PLACES[0])
    world.gate("commit").wait_reached()
    engine.half.preempted(["p"])
    world.gate("write").close()
    engine.save("p", *PLACES[1:])
    world.gate("write").wait_reached()
    engine.step({"p"})
    world.gate("commit").open()
    engine.until(lambda: len(engine.half._jobs._saves) == 1)
    engine.step()
    assert engine.sent == []
    world.gate("write").open()
    engine.until(lambda: engine.sent == ["p"])


def test_a_preempted_request_that_saves_no_more_is_not_sent(world, engine):
    engine.save("p", *PLACES)
    engine.half.preempted(["p", "unknown"])
    engine.step({"p"})
    idle(engine)
    engine.step()
    assert engine.sent == []


def test_nobody_waits_for_requests_that_save_nothing(world, engine):
    world.gate("write").close()
    engine.save("p", *PLACES)
    world.gate("write").wait_reached()
    engine.half.preempted(["q"])
    engine.step({"q"})
    assert engine.sent == []
    world.gate("write").open()
    engine.step({"p"})
    engine.until(lambda: engine.sent == ["p"])


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
