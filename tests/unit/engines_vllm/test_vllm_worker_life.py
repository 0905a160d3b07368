"""The worker half's own life: what it says over the bus, what nobody hears, and that nothing is left of it."""

import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.vllm_worker import BLOCK, CHUNK, LIMIT_S, PLACES, Engine, place, shared_world

from engines.vllm.bus import Bus
from engines.vllm.connector import bus_messages as m
from kvcore.errors import ConfigError


@pytest.fixture
def rig():
    with shared_world() as rig:
        yield rig


class Front:
    """The engine front's bus on the metadata server's loop, and all that was said to it."""

    def __init__(self, world) -> None:
        self.world = world
        self.said: list[m.FromWorker] = []
        self.bus = Bus()
        handle = self.bus._handle

        def noting(channel, rank, frame):
            self.said.append(frame)
            return handle(channel, rank, frame)

        self.bus._handle = noting
        world.at_home(self.bus.__aenter__())

    @property
    def path(self) -> str:
        return self.bus.path

    def all(self, kind):
        return [frame for frame in self.said if isinstance(frame, kind)]

    def wait(self, kind, count: int = 1):
        end = time.monotonic() + LIMIT_S
        while len(self.all(kind)) < count:
            assert time.monotonic() < end, self.said
            threading.Event().wait(0.001)
        return self.all(kind)[-1]

    def call(self, method, *args):
        async def on_its_loop():
            return method(*args)

        return self.world.at_home(on_its_loop())

    def close(self) -> None:
        self.world.at_home(self.bus.__aexit__(None, None, None))


@contextmanager
def front_of(world):
    front = Front(world)
    try:
        yield front
    finally:
        front.close()


@pytest.fixture
def front(rig):
    with front_of(rig[0]) as front:
        yield front


# --- the bus -------------------------------------------------------------------------------------------------------


def test_the_first_word_is_what_kv_it_is(rig, front):
    engine = rig[1]("a", bus=front.path)
    hello = front.wait(m.WorkerHello)
    assert hello.spec == engine.half.spec
    assert (hello.spec.chunk_tokens, hello.spec.chunk_bytes) == (CHUNK, 2 * engine.blocks.block_bytes)


def test_a_half_shows_its_rank_and_its_jobs(rig):
    world, make = rig
    engine = make("a")
    world.gate("write").close()
    engine.save("p", *PLACES)
    world.gate("write").wait_reached()
    assert repr(engine.half) == "<WorkerHalf rank 0 of 1, open, <WorkerJobs 0 loads, 1 saves with 3 chunks>>"


def test_the_end_of_a_prompts_saves_is_told_before_its_request_has_finished(rig, front):
    engine = rig[1]("a", bus=front.path)
    front.wait(m.WorkerHello)
    reserve = tuple((saved.key, len(saved.block_ids)) for saved in PLACES)
    engine.save("p", *PLACES[:2], leg="leg", first_chunk=4, reserve=reserve)
    engine.until(lambda: engine.counters().get("chunks_stored") == 2)
    assert not front.all(m.SaveEnded)
    engine.save("p", PLACES[2], leg="leg", first_chunk=6, reserve=())
    told = front.wait(m.SaveEnded)
    assert (told.leg, told.rank, told.num_chunks) == ("leg", 0, 7)
    assert sum(move.num_bytes for move in told.moved) > 5 * engine.blocks.block_bytes
    engine.step({"p"})
    engine.until(lambda: engine.sent == ["p"])
    engine.save("last", place(9, 9), leg="last")
    front.wait(m.SaveEnded, 2)
    assert [said.leg for said in front.all(m.SaveEnded)] == ["leg", "last"]


def test_only_leading_chunks_that_are_stored_count(rig, front):
    world, make = rig
    other, engine = make("b"), make("a", bus=front.path)
    front.wait(m.WorkerHello)
    other.saved("o", place(1, 0, 1))
    world.down.add("commit")
    engine.saved("p", *PLACES, leg="leg")
    assert front.wait(m.SaveEnded).num_chunks == 1


def test_a_cut_save_tells_nothing_the_one_after_it_does(rig, front):
    world, make = rig
    engine = make("a", bus=front.path)
    front.wait(m.WorkerHello)
    world.gate("reserve").close()
    engine.save("p", *PLACES, leg="leg")
    world.gate("reserve").wait_reached()
    engine.half.preempted(["p"])
    world.gate("reserve").open()
    engine.until(lambda: not engine.half._jobs._saves)
    engine.saved("p", *PLACES[:2], leg="leg")
    front.wait(m.SaveEnded)
    assert [said.num_chunks for said in front.all(m.SaveEnded)] == [2]


def test_a_load_tells_how_far_it_came(rig, front):
    _, make = rig
    prefiller, decoder = make("a"), make("b", bus=front.path)
    front.wait(m.WorkerHello)
    prefiller.saved("p", *PLACES)
    decoder.loaded("d", place(1, 8, 9), place(2, 10, 11), place(3, 12, num_tokens=3), leg="leg", first_chunk=2)
    told = front.wait(m.LoadEnded)
    assert (told.leg, told.first_chunk, told.num_chunks, told.num_tokens) == ("leg", 2, 5, 4 * CHUNK + 3)
    assert told.moved[0].direction == "get" and told.load_s > 0
    decoder.loaded("e", place(77, 8, 9), leg="leg", first_chunk=1, keep_blocks=1)
    told = front.wait(m.LoadEnded, 2)
    assert (told.first_chunk, told.num_chunks, told.num_tokens) == (1, 1, CHUNK + BLOCK)


def test_requests_without_a_leg_tell_nothing(rig, front):
    engine = rig[1]("a", bus=front.path)
    front.wait(m.WorkerHello)
    engine.saved("p", *PLACES)
    engine.loaded("d", place(1, 8, 9))
    engine.loaded("e", place(1, 8, 9), leg="leg")
    front.wait(m.LoadEnded)
    assert len(front.said) == 2


def test_a_sample_has_what_was_counted(rig, front):
    world, make = rig
    engine = make("a", bus=front.path)
    front.wait(m.WorkerHello)
    engine.saved("p", *PLACES)
    engine.loaded("d", place(1, 8, 9), place(99, 10, 11))
    world.gate("read").close()
    engine.load("slow", place(1, 8, 9))
    world.gate("read").wait_reached()
    world.gate("write").close()
    engine.save("q", place(9, 9), place(10, 10))
    world.gate("write").wait_reached()
    front.world.at_home(front.bus.samples(LIMIT_S))
    sample = front.wait(m.WorkerSample)
    assert (sample.rank, sample.loading, sample.pending_saves) == (0, 1, 2)
    assert {**sample.counters, "x": 0}.items() >= {
        "chunks_stored": 3,
        "chunks_loaded": 1,
        "chunk_miss_absent": 1,
    }.items()
    assert sample.store["chunks_put"] == 3 and sample.store["moved.inproc.put.bytes"] > 0
    assert sample.transports == {"a.1": "inproc"}


def test_the_front_ends_a_handoff_over_the_bus(rig, front):
    world, make = rig
    decoder = make("b", bus=front.path)
    front.wait(m.WorkerHello)
    decoder.load("d", *PLACES, leg="leg", wait_until=time.monotonic() + 60)
    decoder.until(lambda: world.stats().waiters == 1)
    front.call(front.bus.end_handoff, "leg")
    decoder.until(lambda: decoder.received == ["d"])
    decoder.failed.clear()
    front.call(front.bus.end_handoff, "early")
    front.world.at_home(front.bus.samples(LIMIT_S))  # in order: it has been heard when this is answered
    assert decoder.loaded("e", *PLACES, leg="early", wait_until=time.monotonic() + 60) == [0, 1, 2, 3, 4]


def test_without_a_front_all_goes_on_and_a_later_one_is_found(rig, tmp_path):
    world, make = rig
    path = tmp_path / "bus.sock"
    engine = make("a", bus=str(path))
    engine.saved("p", *PLACES, leg="leg")
    assert engine.loaded("d", place(1, 8, 9), leg="leg") == []
    for _ in range(2):
        with front_of(world) as front:
            path.symlink_to(front.path)
            assert front.wait(m.WorkerHello).spec == engine.half.spec
            engine.loaded(f"e{id(front)}", place(1, 8, 9), leg="leg")
            front.wait(m.LoadEnded)
        path.unlink()


def test_a_front_that_speaks_nonsense_is_left_and_tried_again(rig, front):
    engine = rig[1]("a", bus=front.path)
    front.wait(m.WorkerHello)

    def talk_nonsense():
        for worker in front.bus._workers.values():
            worker.channel.send(b"\xc1")

    front.call(talk_nonsense)
    front.wait(m.WorkerHello, 2)
    assert engine.loaded("d", *PLACES) == [0, 1, 2, 3, 4]


# --- its end -------------------------------------------------------------------------------------------------------


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_of_a_half_that_was_closed(rig, front):
    world, _ = rig
    fds, threads = open_fds(), threading.active_count()
    engine = Engine(world, "a", bus=front.path)
    front.wait(m.WorkerHello)
    engine.saved("p", *PLACES)
    engine.loaded("d", place(1, 8, 9))
    world.gate("read").close()
    engine.load("hangs", place(1, 8, 9))
    world.gate("read").wait_reached()
    engine.half.close()
    engine.half.close()
    assert threading.active_count() == threads
    front.call(lambda: None)
    end = time.monotonic() + LIMIT_S
    while open_fds() > fds:  # the front's end of the connection
        assert time.monotonic() < end
        threading.Event().wait(0.001)


def test_what_is_under_way_at_the_end_is_received_and_saved_if_it_can_be(rig):
    world, make = rig
    engine = make("a")
    world.gate("write").close()
    engine.save("p", *PLACES)
    world.gate("write").wait_reached()
    engine.step({"p"})
    engine.load("d", place(99, 8, 9), leg="leg", wait_until=time.monotonic() + 60)
    closing = threading.Thread(target=engine.half.close)
    closing.start()
    engine.until(lambda: "d" in engine.received)
    world.gate("write").open()
    closing.join(LIMIT_S)
    engine.step()
    assert (engine.sent, engine.received, engine.failed) == (["p"], ["d"], [8, 9])
    assert world.state.num_objects == 3


def test_after_the_end_every_order_ends_at_once_and_nothing_raises(rig):
    engine = rig[1]("a")
    engine.half.close()
    engine.half.preempted(["p"])
    engine.half.end_handoff("leg")
    engine.load("d", place(1, 8, 9), keep_blocks=1)
    engine.save("p", *PLACES)
    engine.half.preempted(["p"])
    engine.save("q", *PLACES)
    engine.step({"q", "d"})
    assert (engine.sent, engine.received, engine.failed) == (["q"], ["d"], [9])


def test_when_our_thread_dies_what_is_under_way_ends(rig):
    world, make = rig
    engine = make("a")
    world.gate("write").close()
    engine.save("p", *PLACES)
    world.gate("write").wait_reached()
    engine.load("d", place(99, 8, 9), leg="leg", wait_until=time.monotonic() + 60)
    engine.step({"p"})
    engine.half._post(engine.half._running.loop.stop)
    engine.until(lambda: (engine.sent, engine.received) == (["p"], ["d"]))
    assert engine.failed == [8, 9]


def test_blocks_that_cannot_mark_their_stream_fail_the_loads_and_drop_the_saves(rig):
    world, make = rig
    engine = make("a")
    engine.save("p", PLACES[0])
    engine.until(lambda: world.state.num_objects == 1)

    def broken():
        raise RuntimeError("CUDA error")

    engine.blocks.mark = broken
    assert engine.loaded("d", place(1, 8, 9)) == [8, 9]
    engine.save("p", PLACES[1], first_chunk=1)
    engine.save("q", PLACES[2])
    engine.step({"p", "q"})
    engine.until(lambda: sorted(engine.sent) == ["p", "q"])
    assert (engine.counters()["start_loads_failed"], engine.counters()["offer_saves_failed"]) == (1, 2)


def test_a_half_that_cannot_reach_its_store_does_not_start(rig):
    world, _ = rig
    threads = threading.active_count()

    class Refusing(Engine):
        def _open(self, settings, spec):
            raise ConfigError("transport.kind: no such device")

    with pytest.raises(ConfigError, match="no such device"):
        Refusing(world, "a")
    assert threading.active_count() == threads


def test_its_thread_runs_where_the_engine_may_not_where_vllm_computes(rig):
    """As many cores as the process may use, though it is started on a thread that is bound to one."""
    _, make = rig
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    ran: list[set[int]] = []

    def start_bound() -> None:
        os.sched_setaffinity(0, allowed[:1])
        make("a", cpus=allowed)
        (thread,) = [t for t in threading.enumerate() if t.name == "kvferry-worker-0"]
        ran.append(os.sched_getaffinity(thread.native_id))

    bound = threading.Thread(target=start_bound)
    bound.start()
    bound.join(LIMIT_S)
    assert ran == [set(allowed)]
