"""The states of a replica as prose and as data, bounds that are passed in, and what objects say of themselves."""

import gc
import re
import weakref

from support.metadata_words import keys, new_state, put, registration, reservation

from kvcore.clock import ManualClock
from metadata_server.core import MetadataCore
from metadata_server.index.chunks.rows import TRANSITIONS, ReplicaState
from metadata_server.index.limits import IndexLimits


def test_the_table_in_the_docstring_is_the_one_that_the_code_asserts() -> None:
    rows = re.findall(r"^\s*\| (\w+) \| (\w+) \| .+ \|$", ReplicaState.__doc__ or "", re.MULTILINE)
    named = {"new": None, "gone": None, **{state.name.lower(): state for state in ReplicaState}}
    said = {(named[before], named[after]) for before, after in rows if before != "from"}
    assert said == {(before, after) for before, states in TRANSITIONS.items() for after in states}


def test_objects_say_what_they_are_and_hold() -> None:
    state = new_state()
    state.register(registration("a"), 0.0)
    put(state, "a", [1], 0.0)
    state.reserve(reservation("a", [2]), 0.0)
    state.match(keys(1), 0.0, lease_s=60.0, node_id="a", incarnation=1)
    assert repr(state) == (
        "<MetadataState epoch e1: 1 objects, 1 reservations, 1 read leases; <NodeRegistry 1 live, 1 segments>>"
    )
    assert repr(MetadataCore(state, ManualClock())) == f"<MetadataCore 0 waiters, 0 subscribers: {state}>"
    node = state._nodes["a"]
    assert repr(node) == "<LiveNode a incarnation 1: 1 segments, 1 reservations>"
    use = "8192 of 65536 bytes, 2 replicas"
    assert repr(node.segments["a.1"]) == f"<SegmentRecord a.1: {use}, <Evictor <RowLru from 0 to 0>, 0 aside>>"
    assert repr(state._index) == "<ReplicaIndex 1 keys complete, 1 being written, 2 rows>"
    assert repr(state._index.table) == "<ReplicaTable 2 of 64 rows, 1 pinned>"
    assert repr(state._index.rooms) == "<SegmentRooms 1 segments, 65536 bytes>"
    assert (repr(state._reservations), repr(state._reading)) == ("<Reservations 1 open>", "<Reading 1 leases>")
    assert repr(state._reading.leases) == "<ReadLeases 1 held, by 1 nodes>"
    assert repr(state._deadlines) == "<Deadlines 3, next 5.0>"


def test_leases_are_bounded() -> None:
    state = new_state(limits=IndexLimits(max_read_leases=1))
    state.register(registration("a"), 0.0)
    put(state, "a", [1], 0.0)
    assert [state.match(keys(1), 0.0, lease_s=9.0).lease_id > 0 for _ in range(2)] == [True, False]
    assert state.counters["leases_refused"] == 1


def test_a_chunk_is_nothing_that_the_collector_has_to_visit():
    state = new_state()
    state.register(registration("a", units=4096), 0.0)
    gc.collect()
    before = len(gc.get_objects())
    for first in range(0, 4096, 64):
        put(state, "a", list(range(first, first + 64)), 0.0)
    gc.collect()
    assert state.num_objects == 4096 and len(gc.get_objects()) - before < 1024


def test_what_a_dropped_segment_held_is_freed_without_the_collector():
    state = new_state()
    state.register(registration("a", units=64), 0.0)
    put(state, "a", list(range(64)), 0.0)
    record = weakref.ref(state._nodes.segments["a.1"])
    gc.disable()
    try:
        state.register(registration("a", units=0), 0.0)
        assert record() is None and state.num_objects == 0
    finally:
        gc.enable()
