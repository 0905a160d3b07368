"""What the state does when things run out, are full, come late or twice."""

import pytest
from support.metadata_words import (
    UNIT,
    granted,
    ids,
    key,
    keys,
    new_state,
    put,
    registration,
    reservation,
    segment,
    stored,
)

from kvcore.errors import MetadataProtocolError
from metadata_server.messages import (
    EventKind,
    HeartbeatRequest,
    LeaveRequest,
    ManifestEntry,
    QuarantineItem,
    QuarantineReason,
    QuarantineRequest,
    RegisterRequest,
    ReserveStatus,
    SegmentManifest,
)

NODE_A = {"node_id": "a", "incarnation": 1}


def statuses(reply):
    return [outcome.status.value for outcome in reply.outcomes]


def quarantine(state, replica, now=0.0):
    item = QuarantineItem(replica=replica, reason=QuarantineReason.CHECKSUM)
    state.quarantine(QuarantineRequest(items=[item]), now)


@pytest.fixture
def state():
    state = new_state()
    state.register(registration("a"), 0.0)
    state.register(registration("b"), 0.0)
    yield state
    state.check_invariants(0.0 if state.next_deadline() is None else state.next_deadline() - 1e-9)


def alive(state, *nodes, now):
    for node in nodes:
        assert state.heartbeat(HeartbeatRequest(node_id=node, incarnation=1), now).known


# --- reservations ------------------------------------------------------------------------------------------------


def test_a_reserved_chunk_is_not_visible_until_its_commit(state):
    replicas = granted(state.reserve(reservation("a", [1]), 0.0))
    assert state.match(keys(1), 0.0).replicas == []
    assert state.commit(ids("a", replicas), 0.0).committed == [True]
    assert state.match(keys(1), 0.0).replicas == [replicas]


def test_a_commit_after_the_reservation_expired_is_refused(state):
    replicas = granted(state.reserve(reservation("a", [1], ttl_s=1.0), 0.0))
    assert state.commit(ids("a", replicas), 1.0).committed == [False]
    assert stored(state, [1], 1.0) == []


def test_room_of_an_expired_reservation_rests_for_the_grace_time():
    state = new_state()
    state.register(registration("a", units=1), 0.0)
    state.reserve(reservation("a", [1], ttl_s=1.0), 0.0)
    state.tick(1.0)
    assert statuses(state.reserve(reservation("a", [2]), 2.9)) == ["full"]
    assert statuses(state.reserve(reservation("a", [2]), 3.0)) == ["granted"]


def test_room_of_an_aborted_reservation_rests_too_and_abort_is_idempotent():
    state = new_state()
    state.register(registration("a", units=1), 0.0)
    replicas = granted(state.reserve(reservation("a", [1]), 0.0))
    state.abort(ids("a", replicas), 0.0)
    state.abort(ids("a", replicas), 0.0)
    assert state.stats(0.0, 0).reservations == 0 and state.counters["aborted"] == 1
    assert statuses(state.reserve(reservation("a", [2]), 1.9)) == ["full"]
    assert statuses(state.reserve(reservation("a", [2]), 2.0)) == ["granted"]


def test_commit_is_idempotent_for_its_writer_and_refused_to_others(state):
    replicas = granted(state.reserve(reservation("a", [1, 2]), 0.0))
    assert state.commit(ids("b", replicas), 0.0).committed == [False, False]
    assert state.commit(ids("a", replicas, incarnation=2), 0.0).committed == [False, False]
    assert state.commit(ids("a", replicas[:1]), 0.0).committed == [True]
    assert state.commit(ids("a", [*replicas, replicas[0]]), 0.0).committed == [True, True, True]
    state.abort(ids("a", replicas), 0.0)  # what is complete stays
    assert stored(state, [1, 2], 0.0) == [1, 2]


def test_unknown_replica_ids_are_refused_item_by_item(state):
    replicas = granted(state.reserve(reservation("a", [1]), 0.0))
    request = ids("a", replicas)
    mixed = type(request)(node_id="a", incarnation=1, replica_ids=[10**6, replicas[0].id, -1])
    assert state.commit(mixed, 0.0).committed == [False, True, False]


def test_who_asks_is_told_who_is_writing_the_chunk_already(state):
    asked = state.reserve(reservation("b", [1, 2]), 0.0)
    assert [outcome.writers for outcome in asked.outcomes] == [[], []]
    late = state.reserve(reservation("a", [1, 2, 3]), 0.0)
    assert [outcome.writers for outcome in late.outcomes] == [["b"], ["b"], []]
    last = state.reserve(reservation("a", [1]), 0.0)
    assert statuses(last) == ["busy"] and last.outcomes[0].writers == ["b", "a"]
    assert state.match(keys(1, 2), 0.0).writers == ["b", "a"]
    assert [state.match(keys(*asked), 0.0).num_writing for asked in ([1, 2], [3, 4, 1], [4, 1])] == [2, 1, 0]
    state.commit(ids("b", granted(asked)[:1]), 0.0)
    reply = state.match(keys(1, 2, 3), 0.0)
    assert (len(reply.replicas), reply.writers) == (1, ["b", "a"]), "of the first chunk that is missing"
    assert reply.num_writing == 2
    assert state.match(keys(1), 0.0).writers == state.match(keys(4), 0.0).writers == []
    state.abort(ids("b", granted(asked)[1:]), 0.0)
    state.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    assert state.match(keys(1, 2), 0.0).writers == [], "a writer that has given up or is gone writes nothing"


def test_several_writers_up_to_the_bound_then_busy_never_twice_in_one_segment(state):
    first = granted(state.reserve(reservation("a", [1], prefer="b.1"), 0.0))
    second = granted(state.reserve(reservation("b", [1], prefer="b.1"), 0.0))
    assert {r.segment_id for r in first + second} == {"a.1", "b.1"}
    assert statuses(state.reserve(reservation("a", [1]), 0.0)) == ["busy"]
    assert state.commit(ids("a", first), 0.0).committed == [True]
    assert statuses(state.reserve(reservation("b", [1]), 0.0)) == ["exists"]
    assert state.commit(ids("b", second), 0.0).committed == [True]
    assert len(state.match(keys(1), 0.0).replicas[0]) == 2


def test_one_segment_takes_one_writer_a_key():
    state = new_state()
    state.register(registration("a"), 0.0)
    assert statuses(state.reserve(reservation("a", [1, 1]), 0.0)) == ["granted", "busy"]


def test_a_writer_that_is_not_registered_does_without(state):
    reply = state.reserve(reservation("nobody", [1, 2]), 0.0)
    assert statuses(reply) == ["full", "full"] and reply.segments == []
    assert statuses(state.reserve(reservation("a", [1], incarnation=7), 0.0)) == ["full"]


def test_generations_grow_over_reservations_and_above_imported_ones(state):
    entry = ManifestEntry(key=key(9), offset=0, length=UNIT, generation=FAR)
    state.register(registration("c", entries=[entry]), 0.0)
    first, second = granted(state.reserve(reservation("a", [1, 2]), 0.0))
    assert FAR < first.generation < second.generation


FAR = 1 << 50


# --- placement and eviction --------------------------------------------------------------------------------------


def test_eviction_begins_above_the_high_watermark_and_ends_at_the_low_one():
    state = new_state(high_watermark=0.8, low_watermark=0.4)
    state.register(registration("a", units=10), 0.0)
    put(state, "a", list(range(8)), 0.0)
    assert stored(state, list(range(8)), 0.0) == list(range(8))
    put(state, "a", [8], 0.0)
    assert state.stats(0.0, 0).segments[0].used_bytes == 4 * UNIT
    assert state.counters["evicted"] == 5


def test_the_tail_of_a_prefix_goes_first_and_what_was_matched_last_goes_last():
    state = new_state(low_watermark=1.0)
    state.register(registration("a", units=4), 0.0)
    put(state, "a", [1, 2], 0.0)
    put(state, "a", [3, 4], 0.0)
    state.match(keys(1, 2), 0.0)
    put(state, "a", [5], 0.0)
    assert stored(state, [1, 2, 3, 4, 5], 0.0) == [1, 2, 3, 5]
    put(state, "a", [6], 0.0)
    assert stored(state, [1, 2, 3, 5, 6], 0.0) == [1, 2, 5, 6]
    put(state, "a", [7], 0.0)
    assert stored(state, [1, 2, 5, 6, 7], 0.0) == [1, 5, 6, 7]


def test_a_store_full_of_leased_and_reserved_chunks_declines_and_evicts_again_after_release():
    state = new_state()
    state.register(registration("a", units=2), 0.0)
    put(state, "a", [1], 0.0)
    lease = state.match(keys(1), 0.0, lease_s=3.0, **NODE_A).lease_id
    reserved = granted(state.reserve(reservation("a", [2]), 0.0))
    assert statuses(state.reserve(reservation("a", [3]), 1.0)) == ["full"]
    assert stored(state, [1], 1.0) == [1]
    state.release([lease, lease, 999], 1.0)
    assert statuses(state.reserve(reservation("a", [3]), 1.0)) == ["granted"]
    assert state.commit(ids("a", reserved), 1.0).committed == [True]
    state.check_invariants(1.0)


def test_a_chunk_longer_than_any_segment_is_declined_without_evicting(state):
    put(state, "a", [1], 0.0)
    assert statuses(state.reserve(reservation("a", [2], units=17), 0.0)) == ["full"]
    assert stored(state, [1], 0.0) == [1]


def test_a_store_without_segments_declines():
    state = new_state()
    state.register(registration("a", units=0), 0.0)
    assert statuses(state.reserve(reservation("a", [1]), 0.0)) == ["full"]


# --- read leases -------------------------------------------------------------------------------------------------


def test_a_lease_ends_by_itself_and_a_probe_does_not_renew_it():
    state = new_state()
    state.register(registration("a", units=1), 0.0)
    put(state, "a", [1], 0.0)
    assert state.match(keys(1), 0.0, lease_s=2.0, **NODE_A).lease_id > 0
    assert state.match(keys(1), 1.9).lease_id == 0
    assert statuses(state.reserve(reservation("a", [2]), 1.9)) == ["full"]
    assert statuses(state.reserve(reservation("a", [2]), 2.0)) == ["granted"]


def test_a_lease_protects_until_the_last_of_several_ends():
    state = new_state()
    state.register(registration("a", units=1), 0.0)
    put(state, "a", [1], 0.0)
    first = state.match(keys(1), 0.0, lease_s=3.0, **NODE_A).lease_id
    state.match(keys(1), 0.0, lease_s=2.0, **NODE_A)
    state.release([first], 0.0)
    assert statuses(state.reserve(reservation("a", [2]), 1.0)) == ["full"]
    assert statuses(state.reserve(reservation("a", [2]), 2.0)) == ["granted"]


@pytest.mark.parametrize("who", [{}, {"node_id": "a", "incarnation": 2}, {"node_id": "x", "incarnation": 1}])
def test_one_who_is_no_node_cannot_keep_the_cache_from_changing(who):
    state = new_state()
    state.register(registration("a", units=8), 0.0)
    put(state, "a", list(range(8)), 0.0)
    granted_to = [number for number in range(8) if state.match(keys(number), 0.0, lease_s=60.0, **who).lease_id]
    assert (granted_to, state.counters["leases_refused"]) == ([0, 1], 6)
    assert state.match(keys(7), 0.0, lease_s=60.0, **NODE_A).lease_id, "a node's leases are its own"
    assert statuses(state.reserve(reservation("a", list(range(10, 18))), 0.0)).count("granted") == 5
    for now in range(4, 32, 4):
        alive(state, "a", now=now)
    assert state.stats(29.0, 0).read_leases == 3
    assert state.match(keys(0), 30.0, lease_s=60.0, **who).lease_id, "the first ones have run out"
    state.check_invariants(30.0)


def test_no_lease_without_a_match(state):
    assert state.match(keys(1), 0.0, lease_s=2.0).lease_id == 0
    assert state.stats(0.0, 0).read_leases == 0


def test_a_match_ends_at_the_first_gap_and_names_each_segment_once(state):
    put(state, "a", [1, 2, 4], 0.0, prefer="b.1")
    reply = state.match(keys(1, 2, 3, 4), 0.0)
    assert [refs[0].key for refs in reply.replicas] == keys(1, 2)
    assert reply.segments == [segment("b")]


# --- nodes -------------------------------------------------------------------------------------------------------


def test_an_expired_node_takes_its_segment_its_reservations_and_its_leases_along():
    state = new_state()
    state.register(registration("a"), 0.0)
    state.register(registration("b"), 0.0)
    put(state, "b", [1], 0.0, prefer="a.1")
    put(state, "b", [2], 0.0)
    mine = granted(state.reserve(reservation("a", [3], prefer="b.1"), 0.0))
    state.match(keys(2), 0.0, lease_s=60.0, node_id="a", incarnation=1)
    alive(state, "b", now=4.0)
    assert state.next_deadline() == 5.0
    state.tick(5.0)
    stats = state.stats(5.0, 0)
    assert [n.id for n in stats.nodes] == ["b"]
    assert (stats.objects, stats.reservations, stats.read_leases) == (1, 0, 0)
    assert stats.segments[0].retiring_bytes == UNIT
    assert state.commit(ids("a", mine), 5.0).committed == [False]
    assert not state.heartbeat(HeartbeatRequest(node_id="a", incarnation=1), 5.0).known
    state.check_invariants(5.0)


def test_registering_again_with_the_same_incarnation_changes_nothing(state):
    replicas = put(state, "a", [1], 0.0)
    held = granted(state.reserve(reservation("a", [2]), 0.0))
    manifest = [
        ManifestEntry(key=r.key, offset=r.offset, length=r.length, generation=r.generation) for r in [*replicas, *held]
    ]
    reply = state.register(registration("a", entries=manifest), 0.0)
    assert (reply.imported, reply.refused) == (1, 1)
    assert state.commit(ids("a", held), 0.0).committed == [True]
    assert stored(state, [1, 2], 0.0) == [1, 2]


def test_a_segment_that_is_not_announced_any_more_is_dropped(state):
    put(state, "a", [1], 0.0)
    state.register(registration("a", units=0), 0.0)
    assert stored(state, [1], 0.0) == []


@pytest.mark.parametrize(
    ("segments", "problem"),
    [
        ([segment("b")], "another node"),
        ([segment("a", units=17)], "cannot change"),
        ([segment("a"), segment("a")], "twice"),
    ],
)
def test_a_registration_with_an_impossible_segment_is_refused_whole(state, segments, problem):
    put(state, "a", [1], 0.0)
    request = RegisterRequest(
        node=registration("a").node, segments=[SegmentManifest(segment=s) for s in segments], ttl_s=1.0
    )
    with pytest.raises(MetadataProtocolError, match=problem):
        state.register(request, 0.0)
    assert stored(state, [1], 0.0) == [1]


def test_a_node_cannot_ask_for_a_longer_lease_than_the_server_gives():
    state = new_state()
    state.register(registration("a", ttl_s=100.0), 0.0)
    assert state.next_deadline() == 5.0


# --- manifests and quarantine ------------------------------------------------------------------------------------


def entry(number, at, generation, units=1):
    return ManifestEntry(key=key(number), offset=at * UNIT, length=units * UNIT - 5, generation=generation)


def test_a_manifest_is_taken_in_newest_first_without_overlaps_or_outsiders():
    state = new_state()
    entries = [
        entry(1, 0, 10, units=2),
        entry(2, 1, 11),  # newer: wins over 1
        entry(3, 15, 5, units=2),  # reaches outside
        ManifestEntry(key=key(4), offset=100, length=10, generation=9),  # unaligned
        entry(5, 4, 7),
        entry(5, 6, 8),  # the same key, newer
        entry(6, 16, 1),
    ]
    reply = state.register(registration("a", entries=entries), 0.0)
    assert (reply.imported, reply.refused) == (2, 5)
    assert stored(state, [1, 2, 3, 4, 5, 6], 0.0) == [2, 5]
    assert state.match(keys(5), 0.0).replicas[0][0].offset == 6 * UNIT
    state.check_invariants(0.0)


def test_a_restarted_server_knows_again_what_the_nodes_find_in_their_segments():
    old = new_state()
    old.register(registration("a"), 0.0)
    replicas = put(old, "a", [1, 2, 3], 0.0)
    found = [ManifestEntry(key=r.key, offset=r.offset, length=r.length, generation=r.generation) for r in replicas]
    new = new_state(epoch="e2")
    assert not new.heartbeat(HeartbeatRequest(node_id="a", incarnation=1), 0.0).known
    assert new.commit(ids("a", replicas), 0.0).committed == [False] * 3
    assert new.register(registration("a", entries=found), 0.0).imported == 3
    again = new.match(keys(1, 2, 3), 0.0).replicas
    assert [(r.key, r.offset, r.generation) for (r,) in again] == [(r.key, r.offset, r.generation) for r in replicas]
    assert new.commit(ids("a", replicas), 0.0).committed == [False] * 3  # ids of another life


def test_quarantine_drops_exactly_that_generation_whatever_its_id(state):
    (old,) = put(state, "a", [1], 0.0)
    quarantine(state, old)
    assert stored(state, [1], 0.0) == [] and state.counters["quarantined_checksum"] == 1
    (new,) = put(state, "a", [1], 0.0)
    quarantine(state, old)
    assert stored(state, [1], 0.0) == [1]
    other_id = type(new)(
        id=77, key=new.key, segment_id=new.segment_id, offset=new.offset, length=new.length, generation=new.generation
    )
    lease = state.match(keys(1), 0.0, lease_s=5.0).lease_id
    quarantine(state, other_id)
    assert stored(state, [1], 0.0) == []
    state.release([lease], 0.0)


def test_quarantine_does_not_touch_a_reservation(state):
    (held,) = granted(state.reserve(reservation("a", [1]), 0.0))
    quarantine(state, held)
    assert state.commit(ids("a", [held]), 0.0).committed == [True]


# --- events ------------------------------------------------------------------------------------------------------


def test_events_tell_every_change_in_order():
    state = new_state(low_watermark=1.0)
    state.register(registration("a", units=2), 0.0)
    put(state, "a", [1, 2], 0.0)
    put(state, "a", [3], 0.0)
    state.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    events = list(state.log.since(1))
    assert [e.seq for e in events] == [1, 2, 3, 4, 5]
    assert [(e.kind, list(e.keys)) for e in events] == [
        (EventKind.NODE_UP, []),
        (EventKind.STORED, keys(1, 2)),
        (EventKind.REMOVED, keys(2)),
        (EventKind.STORED, keys(3)),
        (EventKind.NODE_DOWN, []),
    ]


def test_statuses_are_what_the_wire_says():
    assert {s.value for s in ReserveStatus} - {"unknown"} == {"granted", "exists", "busy", "full"}
