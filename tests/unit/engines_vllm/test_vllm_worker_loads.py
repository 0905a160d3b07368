"""Loads of the worker half: what comes is the KV that was saved, what does not is reported, once and in time."""

import threading
import time

import pytest
from support.vllm_kv import CheckedStreams
from support.vllm_worker import LIMIT_S, place, shared_world

from engines.vllm.connector.blocks.device_blocks import DeviceBlocks

SAVED = [place(1, 0, 1), place(2, 2, 3), place(3, 4, num_tokens=3)]
PLACES = [place(1, 8, 9), place(2, 10, 11), place(3, 12, num_tokens=3)]


@pytest.fixture
def rig():
    with shared_world() as rig:
        yield rig


@pytest.fixture
def world(rig):
    return rig[0]


@pytest.fixture
def pair(rig):
    """A prefiller that has saved three chunks, the last one a tail, and a decoder."""
    _, make = rig
    prefiller, decoder = make("a"), make("b")
    prefiller.saved("p", *SAVED)
    return prefiller, decoder


def forever() -> float:
    return time.monotonic() + 60


def damage(world, number: int, at: int = 1000) -> None:
    (replica,) = world.replicas(SAVED[number].key)
    world.memory[replica.ref.segment_id][replica.ref.offset + at] ^= 1


# --- what does not come --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "failed"), [(0, [8, 9, 10, 11, 12]), (1, [10, 11, 12]), (2, [12])])
def test_a_damaged_chunk_and_all_behind_it_are_failed_blocks(world, pair, number, failed):
    prefiller, decoder = pair
    damage(world, number)
    assert decoder.loaded("d", *PLACES) == failed
    good = [n for n in range(8, 13) if n not in failed]
    assert decoder.content(*good) == prefiller.content(*range(len(good)))
    assert decoder.counters()["chunk_miss_checksum"] == 1


def test_a_chunk_of_other_weights_is_not_loaded(rig, pair):
    _, make = rig
    other = make("b", weights="others")
    assert other.loaded("d", *PLACES) == [8, 9, 10, 11, 12]
    assert other.counters()["chunk_miss_foreign"] == 1


def test_a_chunk_whose_place_was_given_to_another_is_not_loaded(world, pair):
    _, decoder = pair
    (first,), (second,) = world.replicas(SAVED[0].key), world.replicas(SAVED[1].key)
    memory = world.memory[first.ref.segment_id]
    length = first.ref.length
    memory[first.ref.offset : first.ref.offset + length] = memory[second.ref.offset : second.ref.offset + length]
    assert decoder.loaded("d", *PLACES) == [8, 9, 10, 11, 12]
    assert decoder.counters()["chunk_miss_stale"] == 1


def test_chunks_that_nobody_has_are_received_as_failed(rig):
    _, make = rig
    decoder = make("b")
    assert decoder.loaded("d", *PLACES) == [8, 9, 10, 11, 12]
    assert decoder.counters()["chunk_miss_absent"] == 3


def test_without_a_metadata_server_all_blocks_fail(world, pair):
    _, decoder = pair
    world.down.add("")
    assert decoder.loaded("d", *PLACES) == [8, 9, 10, 11, 12]
    world.down.clear()
    tries = iter(range(10_000))
    decoder.until(lambda: decoder.loaded(f"again-{next(tries)}", *PLACES) == [])


def test_blocks_that_are_kept_fail_neither_nor_change(world, pair):
    _, decoder = pair
    decoder.fill(8, number=7.0)
    damage(world, 0)
    assert decoder.loaded("d", *PLACES, keep_blocks=1) == [9, 10, 11, 12]
    assert decoder.holds(8, 7.0)


def test_an_error_of_ours_fails_its_load_alone(rig, pair):
    _, make = rig

    class Broken:
        def __init__(self, store):
            self._store = store
            self.broken = True

        async def match(self, keys, *, timeout_s, owner):
            if self.broken:
                self.broken = False
                raise RuntimeError("a bug")
            return await self._store.match(keys, timeout_s=timeout_s)

        def __getattr__(self, name):
            return getattr(self._store, name)

    decoder = make("b", wrap=Broken)
    assert decoder.loaded("d", *PLACES) == [8, 9, 10, 11, 12]
    assert decoder.counters()["load_failed"] == 1
    assert decoder.loaded("again", *PLACES) == []


def test_an_unknown_block_fails_its_load_alone(pair):
    _, decoder = pair
    assert decoder.loaded("d", place(1, 8, 99)) == [8, 99]
    assert decoder.loaded("again", *PLACES) == []


# --- what comes ----------------------------------------------------------------------------------------------------


def test_what_one_half_saves_another_one_loads_to_the_byte(pair):
    prefiller, decoder = pair
    before = decoder.content(*range(8), 13, 14, 15)
    assert decoder.loaded("d", *PLACES) == []
    assert decoder.content(8, 9, 10, 11, 12) == prefiller.content(0, 1, 2, 3, 4)
    assert decoder.content(*range(8), 13, 14, 15) == before
    assert decoder.counters()["chunks_loaded"] == 3
    decoder.step({"d"})
    decoder.step()
    assert (decoder.received, decoder.sent) == (["d"], [])


def test_kept_blocks_stay_as_they_are_while_the_rest_comes(pair):
    prefiller, decoder = pair
    decoder.fill(8, number=7.0)
    assert decoder.loaded("d", *PLACES, keep_blocks=1) == []
    assert decoder.holds(8, 7.0)
    assert decoder.content(9, 10, 11, 12) == prefiller.content(1, 2, 3, 4)


def test_a_load_of_more_chunks_than_one_get_takes(rig):
    _, make = rig
    prefiller, decoder = make("a"), make("b")
    prefiller.saved("p", *(place(n, n) for n in range(16)))
    assert decoder.loaded("d", *(place(n, 15 - n) for n in range(16))) == []
    assert decoder.content(*reversed(range(16))) == prefiller.content(*range(16))


def test_a_load_goes_on_while_others_come_and_go(world, pair):
    _, decoder = pair
    world.gate("read").close()
    decoder.load("slow", *PLACES)
    world.gate("read").wait_reached()
    assert decoder.loaded("quick", place(9, 14)) == [14]
    assert "slow" not in decoder.received
    world.gate("read").open()
    decoder.until(lambda: "slow" in decoder.received)


def test_the_ranks_of_an_engine_have_chunks_of_their_own(rig):
    _, make = rig
    prefillers = [make("a", rank=rank, tp_size=2) for rank in range(2)]
    decoders = [make("b", rank=rank, tp_size=2) for rank in range(2)]
    prefillers[0].saved("p", *SAVED)
    assert decoders[1].loaded("early", *PLACES) == [8, 9, 10, 11, 12]
    prefillers[1].saved("p", *SAVED)
    for prefiller, decoder in zip(prefillers, decoders, strict=True):
        assert decoder.loaded("d", *PLACES) == []
        assert decoder.content(8, 9, 10, 11, 12) == prefiller.content(0, 1, 2, 3, 4)


# --- handoffs ------------------------------------------------------------------------------------------------------


def test_with_a_handoff_chunks_are_loaded_as_they_are_committed(rig):
    _, make = rig
    prefiller, decoder = make("a"), make("b")
    decoder.load("d", *PLACES, leg="leg", wait_until=forever())
    for number, saved in enumerate(SAVED, 1):
        prefiller.save("p", saved, first_chunk=number - 1)
        decoder.until(lambda number=number: decoder.counters().get("chunks_loaded") == number)
        assert number == 3 or "d" not in decoder.received
    decoder.until(lambda: "d" in decoder.received)
    assert (decoder.failed, decoder.content(8, 9, 10, 11, 12)) == ([], prefiller.content(0, 1, 2, 3, 4))


def test_a_handoff_that_does_not_come_is_waited_for_only_so_long(rig):
    _, make = rig
    decoder = make("b")
    assert decoder.loaded("d", *PLACES, leg="leg", wait_until=time.monotonic() + 0.05) == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("when", ["before the order", "while it waits"])
def test_the_end_of_a_handoff_takes_what_is_there(world, rig, when):
    _, make = rig
    prefiller, decoder = make("a"), make("b")
    prefiller.saved("p", *SAVED[:1])
    if when == "before the order":
        decoder.half.end_handoff("leg")
        decoder.load("d", *PLACES, leg="leg", wait_until=forever())
    else:
        decoder.load("d", *PLACES, leg="leg", wait_until=forever())
        decoder.until(lambda: decoder.counters().get("chunks_loaded") == 1)
        decoder.until(lambda: world.stats().waiters == 1)
        decoder.half.end_handoff("another leg")
        decoder.half.end_handoff("leg")
    decoder.until(lambda: "d" in decoder.received)
    assert decoder.failed == [10, 11, 12]
    assert decoder.content(8, 9) == prefiller.content(0, 1)


def test_the_ends_of_very_many_handoffs_are_not_kept_for_ever(rig):
    _, make = rig
    decoder = make("b")
    for number in range(5000):
        decoder.half.end_handoff(f"leg-{number}")
    assert decoder.loaded("d", *PLACES, leg="leg-4999", wait_until=forever()) == [8, 9, 10, 11, 12]
    decoder.load("waits", *PLACES, leg="leg-0", wait_until=forever())
    decoder.until(lambda: decoder.world.stats().waiters == 1)
    assert len(decoder.half._jobs._ended_handoffs) == 4096


# --- aborts --------------------------------------------------------------------------------------------------------


def test_a_request_that_ends_while_it_loads_gets_no_byte_after_it_was_received(world, pair):
    _, decoder = pair
    world.gate("read").close()
    decoder.load("d", *PLACES)
    world.gate("read").wait_reached()
    decoder.step({"d"})
    decoder.until(lambda: "d" in decoder.received)
    assert decoder.failed == [8, 9, 10, 11, 12]
    decoder.failed.clear()
    decoder.fill(*range(8, 13), number=-3.0)
    world.gate("read").open()
    assert decoder.loaded("last", place(2, 0, 1)) == []  # time for what should not come
    assert all(decoder.holds(n, -3.0) for n in range(8, 13))


def test_a_request_that_ends_while_its_blocks_are_copied_to_the_device_is_received_after_that(rig):
    _, make = rig
    streams = CheckedStreams()
    prefiller = make("a")
    decoder = make("b", make_blocks=lambda layout: DeviceBlocks(layout, streams))
    prefiller.saved("p", *SAVED)
    streams.hold.clear()
    decoder.load("d", *PLACES)
    assert streams.holding.wait(LIMIT_S)
    decoder.step({"d"})
    for _ in range(3):
        assert decoder.loaded(f"other-{len(decoder.received)}", place(9, 14)) == [14]
    assert "d" not in decoder.received
    streams.hold.set()
    decoder.until(lambda: "d" in decoder.received)
    assert decoder.received.count("d") == 1
    decoder.failed.clear()
    decoder.fill(*range(8, 13), number=-3.0)
    assert decoder.loaded("last", place(9, 14)) == [14]
    assert all(decoder.holds(n, -3.0) for n in range(8, 13))


def test_a_request_that_ends_while_it_waits_for_a_handoff_is_received_at_once(world, rig):
    _, make = rig
    decoder = make("b")
    decoder.load("d", *PLACES, leg="leg", wait_until=forever())
    decoder.until(lambda: world.stats().waiters == 1)
    decoder.step({"d"})
    decoder.until(lambda: "d" in decoder.received)
    assert decoder.failed == [8, 9, 10, 11, 12]
    decoder.until(lambda: world.stats().waiters == 0)


def test_an_order_for_a_request_that_ends_in_the_same_step_is_received(pair):
    _, decoder = pair
    decoder.load("d", *PLACES)
    decoder.step({"d"})
    decoder.until(lambda: "d" in decoder.received)
    decoder.step()
    assert decoder.received == ["d"]


def test_a_preempted_load_is_over_when_preempted_returns_and_received_once(world, pair):
    _, decoder = pair
    world.gate("read").close()
    decoder.load("d", *PLACES)
    world.gate("read").wait_reached()
    decoder.half.preempted(["d"])
    decoder.fill(*range(8, 13), number=-3.0)
    world.gate("read").open()
    decoder.until(lambda: "d" in decoder.received)
    assert decoder.failed == [8, 9, 10, 11, 12]
    assert all(decoder.holds(n, -3.0) for n in range(8, 13))


def test_failed_blocks_are_told_with_their_request_and_once(rig):
    _, make = rig
    decoder = make("b")
    decoder.load("d", *PLACES)
    received: set[str] = set()
    failed: set[int] = set()
    end = time.monotonic() + LIMIT_S
    while not received and time.monotonic() < end:
        assert not failed
        _, received = decoder.half.finished(set())
        failed = decoder.half.failed_blocks()
        threading.Event().wait(0.001)
    assert (received, failed) == ({"d"}, {8, 9, 10, 11, 12})
    assert decoder.half.finished(set()) == (set(), set())
    assert decoder.half.failed_blocks() == set()
