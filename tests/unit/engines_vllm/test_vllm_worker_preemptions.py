"""Preemptions at the worker half: nothing reads a request's blocks after them, and nothing half-written is stored."""

import threading

import pytest
from support.vllm_kv import CheckedStreams
from support.vllm_worker import LIMIT_S, PLACES, idle, shared_world, stored

from engines.vllm.connector.blocks.device_blocks import DeviceBlocks
from engines.vllm.connector.limits import ConnectorLimits


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


class Waiting(threading.Thread):
    """`preempted` as vLLM's thread calls it: the test's own thread goes on."""

    def __init__(self, engine, request_id: str) -> None:
        super().__init__(target=engine.half.preempted, args=([request_id],))
        self.start()

    def ended(self) -> None:
        self.join(LIMIT_S)
        assert not self.is_alive()


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
def test_when_our_thread_hangs_a_preemption_goes_on_and_the_save_is_revoked(world, rig, writing):
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
