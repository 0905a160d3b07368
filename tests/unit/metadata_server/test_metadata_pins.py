"""Pins, evictions and times that people give to chunks by their keys."""

import msgspec
import pytest
from support.metadata_rigs import DirectTransport
from support.metadata_words import UNIT, granted, ids, keys, new_state, put, registration, reservation, stored

from kvcore.clock import ManualClock
from metadata_server import cache_messages as c
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.index.limits import IndexLimits
from metadata_server.index.state import MetadataState
from metadata_server.messages import EventKind, ManifestEntry

PINNED = [1, 2, 3]


def a_node(units: int = 8, **settings) -> MetadataState:
    """Node a with `units` of room, evicting one by one; pins may take half of it."""
    state = new_state(low_watermark=1.0, **settings)
    state.register(registration("a", units=units), 0.0)
    return state


def pin(state: MetadataState, numbers: list[int], now: float = 0.0, ttl_s: float | None = None) -> tuple[int, int, int]:
    reply = state.pin(c.PinRequest(keys=keys(*numbers), ttl_s=ttl_s), now)
    return reply.known, reply.done, reply.refused


def flood(state: MetadataState, now: float, first: int = 100) -> None:
    """Twice as many other chunks as there is room for."""
    put(state, "a", list(range(first, first + 16)), now)
    state.check_invariants(now)


@pytest.mark.parametrize("before", [True, False])
def test_pinned_chunks_outlive_a_flood_whether_they_were_there_or_came_later(before):
    state = a_node()
    if before:
        put(state, "a", PINNED, 0.0)
    assert pin(state, PINNED) == (3 if before else 0, 3, 0)
    if not before:
        put(state, "a", PINNED, 0.0)
    flood(state, 1.0)
    assert stored(state, PINNED, 1.0) == PINNED
    state.unpin(c.UnpinRequest(keys=keys(*PINNED)), 1.0)
    flood(state, 2.0, first=200)
    assert stored(state, PINNED, 2.0) == []


def test_a_pin_with_a_time_ends_by_itself_and_the_latest_time_counts():
    state = a_node()
    put(state, "a", [1, 2], 0.0)
    pin(state, [1, 2], ttl_s=10.0)
    pin(state, [2], ttl_s=None)
    state.renew_all_nodes(9.0 - 5.0)
    assert {p.left_s for p in state.pins(None, 4.0).pins} == {6.0, None}
    state.renew_all_nodes(8.0)
    flood(state, 9.9)
    assert stored(state, [1, 2], 9.9) == [1, 2]
    flood(state, 10.0, first=200)
    assert stored(state, [1, 2], 10.0) == [2]


def test_a_pin_that_extends_ends_no_earlier_than_the_one_before():
    state = a_node()
    put(state, "a", [1, 2, 3], 0.0)
    pin(state, [1], ttl_s=None)
    pin(state, [2], ttl_s=10.0)
    state.pin(c.PinRequest(keys=keys(1, 2, 3), ttl_s=5.0, extend=True), 0.0)
    assert [p.left_s for p in state.pins(None, 0.0).pins] == [None, 10.0, 5.0]
    state.pin(c.PinRequest(keys=keys(3), ttl_s=50.0, extend=True), 1.0)
    state.check_invariants(1.0)
    assert [p.left_s for p in state.pins(None, 1.0).pins] == [None, 9.0, 50.0]


def test_pins_take_their_share_of_the_memory_and_what_goes_beyond_is_refused_and_counted():
    state = a_node(units=8, pin_share=0.25)
    put(state, "a", [1, 2, 3], 0.0)
    assert pin(state, [1, 2, 3]) == (3, 2, 1)
    listed = state.pins(None, 0.0)
    assert (listed.num_pins, listed.pinned_bytes, listed.most_bytes) == (2, 2 * UNIT, 2 * UNIT)
    assert state.counters["pins_refused"] == 1
    pin(state, [3], ttl_s=1.0)
    state.unpin(c.UnpinRequest(keys=keys(1)), 0.0)
    assert pin(state, [3]) == (1, 1, 0)
    state.register(registration("b", units=8), 0.0)  # more memory, more pins
    assert pin(state, [1]) == (1, 1, 0)


def test_a_pin_on_what_is_to_come_holds_only_what_fits():
    state = a_node(units=8, pin_share=0.25)
    assert pin(state, PINNED) == (0, 3, 0)
    put(state, "a", PINNED, 0.0)
    assert [p.replicas for p in state.pins(None, 0.0).pins] == [1, 1, 0]
    assert state.counters["pins_without_room"] == 1
    flood(state, 1.0)
    assert stored(state, PINNED, 1.0) == [1, 2]


def test_pins_are_bounded_in_number():
    state = a_node(limits=IndexLimits(max_pins=2, max_listed_pins=1))
    assert pin(state, PINNED) == (0, 2, 1)
    assert pin(state, [1, 2], ttl_s=5.0) == (0, 2, 0)
    listed = state.pins(None, 0.0)
    assert listed.num_pins == 2 and [p.key for p in listed.pins] == keys(1)


def test_every_replica_of_a_pinned_chunk_is_kept_in_every_segment():
    state = a_node()
    state.register(registration("b", units=8), 0.0)
    first = granted(state.reserve(reservation("a", [1], prefer="a.1"), 0.0))
    second = granted(state.reserve(reservation("b", [1], prefer="b.1"), 0.0))
    state.commit(ids("a", first), 0.0)
    state.commit(ids("b", second), 0.0)
    assert pin(state, [1]) == (1, 1, 0)
    for node, number in (("a", 100), ("b", 200), ("a", 300)):
        put(state, node, list(range(number, number + 16)), 1.0, prefer=f"{node}.1")
    assert {r.segment_id for r in state.match(keys(1), 1.0).replicas[0]} == {"a.1", "b.1"}


def test_a_pin_outlives_its_node_and_holds_what_a_manifest_brings_back():
    state = a_node()
    (replica,) = put(state, "a", [1], 0.0)
    pin(state, [1])
    entry = ManifestEntry(key=replica.key, offset=replica.offset, length=replica.length, generation=replica.generation)
    state.register(registration("a", units=8, incarnation=2), 1.0)
    assert stored(state, [1], 1.0) == [] and state.pins(None, 1.0).pinned_bytes == 0
    state.register(registration("a", units=8, incarnation=3, entries=[entry]), 1.0)
    put(state, "a", list(range(100, 116)), 1.0, incarnation=3)
    assert stored(state, [1], 1.0) == [1]
    state.check_invariants(1.0)


def test_evict_forgets_at_once_what_nobody_reads_and_nobody_pinned():
    state = a_node()
    put(state, "a", [1, 2, 3, 4], 0.0)
    pin(state, [2])
    lease = state.match(keys(1), 0.0, lease_s=9.0, node_id="a", incarnation=1).lease_id
    assert lease
    position = state.log.next_seq
    reply = state.evict(c.EvictRequest(keys=keys(1, 2, 3, 4, 5)), 0.0)
    assert (reply.known, reply.done, reply.refused) == (4, 2, 2)
    assert stored(state, [1, 2, 3, 4], 0.0) == [1, 2]
    (event,) = state.log.since(position)
    assert event.kind is EventKind.REMOVED and sorted(event.keys) == keys(3, 4)
    state.check_invariants(0.0)


def test_a_chunk_whose_time_is_up_goes_when_nobody_reads_it():
    state = a_node()
    put(state, "a", [1, 2], 0.0)
    assert state.expire(c.ExpireRequest(keys=keys(1, 2, 3), ttl_s=1.0), 0.0).done == 2
    lease = state.match(keys(1), 0.5, lease_s=60.0, node_id="a", incarnation=1).lease_id
    assert stored(state, [1, 2], 0.9) == [1, 2]
    assert stored(state, [1, 2], 1.0) == [1]
    assert state.next_deadline() == 2.0  # not looked at all the time
    state.release([lease], 1.5)
    assert stored(state, [1, 2], 2.0) == []
    state.check_invariants(2.0)


def test_with_a_ttl_chunks_are_forgotten_so_long_after_they_were_stored_last():
    state = a_node(ttl_s=1.0)
    put(state, "a", [1, 2], 0.0)
    state.match(keys(1, 2), 0.9)  # a use is no storing
    put(state, "a", [3], 0.9)
    pin(state, [2], 0.9)
    assert stored(state, [1, 2, 3], 1.0) == [2, 3]
    put(state, "a", [1], 1.2)
    assert stored(state, [1, 2, 3], 1.9) == [1, 2]
    assert stored(state, [1, 2], 2.2) == [2], "a pin goes before"
    state.check_invariants(22.0)


def test_with_a_ttl_the_time_of_what_a_restarted_server_is_told_of_begins_anew():
    state = new_state(ttl_s=1.0)
    [key] = keys(1)
    entry = ManifestEntry(key=key, offset=0, length=UNIT, generation=1)
    state.register(registration("a", units=4, entries=[entry]), 100.0)
    assert stored(state, [1], 100.9) == [1]
    assert stored(state, [1], 101.0) == []


@pytest.mark.parametrize("ttl_s", [None, 3.0])
def test_a_pinned_chunk_whose_time_is_up_goes_with_its_pin(ttl_s):
    state = a_node()
    put(state, "a", [1], 0.0)
    pin(state, [1], ttl_s=ttl_s)
    state.expire(c.ExpireRequest(keys=keys(1), ttl_s=1.0), 0.0)
    assert stored(state, [1], 2.9) == [1]
    state.check_invariants(2.9)
    if ttl_s is None:
        assert state.unpin(c.UnpinRequest(keys=keys(1, 2)), 3.0).done == 1
    assert stored(state, [1], 3.0) == []
    state.check_invariants(3.0)


async def test_the_clients_calls_reach_the_state():
    core = MetadataCore(a_node(), ManualClock(0.0))
    client = MetadataClient(DirectTransport(core), core._clock, 1.0)
    await client.nodes()
    assert client.protocol >= c.CACHE_CONTROL
    put(core.state, "a", [1, 2], 0.0)
    assert msgspec.structs.astuple(await client.pin(keys(1), 5.0)) == (1, 1, 0)
    assert msgspec.structs.astuple(await client.evict(keys(1, 2))) == (2, 1, 1)
    assert (await client.pins()).pins == [c.Pin(key=keys(1)[0], left_s=5.0, replicas=1)]
    assert msgspec.structs.astuple(await client.unpin(keys(1))) == (1, 1, 0)
    assert msgspec.structs.astuple(await client.expire(keys(1), 5.0)) == (1, 1, 0)
