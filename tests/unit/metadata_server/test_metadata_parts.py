"""Allocator, deadlines and event log by themselves."""

import pytest
from support.metadata_words import UNIT, key

from kvcore.extents import ExtentAllocator
from kvcore.types import ChunkKey
from metadata_server.index.event_log import MAX_BATCH_KEYS, MAX_EVENT_KEYS, EventLog
from metadata_server.index.leases import Deadlines, Expiry
from metadata_server.messages import EventKind


def test_an_allocator_gives_nothing_when_no_extent_is_long_enough():
    space = ExtentAllocator(4 * UNIT + 17)
    offsets = [space.allocate(1) for _ in range(4)]
    assert sorted(offsets) == [0, UNIT, 2 * UNIT, 3 * UNIT] and space.allocate(1) is None
    space.release(offsets[0], 1)
    space.release(offsets[2], UNIT)
    if abs(offsets[0] - offsets[2]) != UNIT:
        assert space.allocate(UNIT + 1) is None
    space.check([(offsets[1], 1), (offsets[3], 1)])


def test_neighbours_are_joined_on_both_sides():
    taken = [(0, 1), (2 * UNIT, 5), (UNIT, UNIT)]
    space = ExtentAllocator(3 * UNIT, taken)
    assert space.allocate(1) is None
    while taken:
        space.release(*taken.pop(0))
        space.check(taken)
    assert space.allocate(3 * UNIT) == 0


def test_the_best_fit_keeps_the_long_extents():
    space = ExtentAllocator(10 * UNIT, taken=[(2 * UNIT, UNIT), (4 * UNIT, UNIT)])
    assert space.allocate(UNIT) == 3 * UNIT and space.largest_free == 5 * UNIT


@pytest.mark.parametrize("taken", [[(1, 5)], [(0, UNIT + 1), (UNIT, 5)], [(3 * UNIT, UNIT + 1)], [(-UNIT, 5)]])
def test_impossible_extents_are_refused(taken):
    with pytest.raises(ValueError, match="extent"):
        ExtentAllocator(4 * UNIT, taken=taken)


def test_freeing_what_is_not_taken_is_a_bug():
    space = ExtentAllocator(4 * UNIT, [(UNIT, UNIT)])
    for offset, length in ((0, UNIT), (2 * UNIT, UNIT), (3 * UNIT, UNIT)):
        with pytest.raises(KeyError):
            space.release(offset, length)
    space.check([(UNIT, UNIT)])


def test_a_moved_or_dropped_deadline_never_fires_and_the_heap_stays_small():
    deadlines = Deadlines()
    for at in range(10_000):
        deadlines.set((Expiry.NODE, "a"), float(at))
        deadlines.set((Expiry.READ_LEASE, at), 1.0)
        deadlines.drop((Expiry.READ_LEASE, at))
    assert deadlines.next == 9999.0 and len(deadlines._heap) < 300
    assert list(deadlines.pop_due(9998.0)) == []
    assert list(deadlines.pop_due(9999.0)) == [(Expiry.NODE, "a")]
    assert deadlines.next is None


def test_what_falls_due_while_popping_is_popped_too():
    deadlines = Deadlines()
    deadlines.set((Expiry.RESERVATION, 1), 1.0)
    seen = []
    for timer, what in deadlines.pop_due(2.0):
        seen.append((timer, what))
        if timer is Expiry.RESERVATION:
            deadlines.set((Expiry.RETIRED, what), 2.0)
    assert seen == [(Expiry.RESERVATION, 1), (Expiry.RETIRED, 1)]


def test_the_ring_forgets_the_oldest_and_says_so():
    log = EventLog("e", 4)
    assert log.has("e", 1) and not log.has("e", 0) and not log.has("e", 2)
    for _ in range(6):
        log.append(EventKind.REMOVED, "a", "s", [key(1)])
    assert not log.has("e", 2) and log.has("e", 3) and log.has("e", 7) and not log.has("e", 8)
    assert not log.has("other", 3)
    batch = log.replay(3)
    assert [event.seq for event in batch.events] == [3, 4, 5, 6] and batch.next_seq == 7
    assert log.replay(7).events == []


def test_batches_are_bounded():
    log = EventLog("e", 100)
    many = [ChunkKey(bytes(16))] * (3 * MAX_BATCH_KEYS)
    log.append(EventKind.STORED, "a", "s", many)
    assert all(len(event.keys) <= MAX_EVENT_KEYS for event in log.since(1))
    position, batches = 1, 0
    while position < log.next_seq:
        batch = log.replay(position)
        assert 0 < sum(len(event.keys) for event in batch.events) <= MAX_BATCH_KEYS
        position, batches = batch.next_seq, batches + 1
    assert batches >= 3
    snapshot = list(log.snapshot([], [("a", "s", many)]))
    assert [batch.reset for batch in snapshot] == [True] + [False] * (len(snapshot) - 1)
    assert snapshot[-1].events == [] and {batch.next_seq for batch in snapshot} == {log.next_seq}
    assert sum(len(event.keys) for batch in snapshot for event in batch.events) == len(many)


def test_the_snapshot_of_nothing_is_a_reset_and_an_end():
    assert [(b.reset, b.events) for b in EventLog("e", 1).snapshot([], [])] == [(True, []), (False, [])]
