"""Read leases end as their readers say, last as long as bytes move, and keep room from others; so do late writers."""

import msgspec
from support.metadata_words import UNIT, granted, ids, key, keys, new_state, put, registration, reservation

from kvcore.config.schema import StoreConfig
from kvstore.limits import StoreLimits
from metadata_server.cache_messages import PinRequest, ReleaseWriterRequest, RenewRequest
from metadata_server.index.leases import Deadlines, ReadLeases
from metadata_server.index.limits import IndexLimits
from metadata_server.messages import (
    CommitRefusal,
    LeaveRequest,
    QuarantineItem,
    QuarantineReason,
    QuarantineRequest,
)
from transfer.limits import TransferLimits

LIMITS = IndexLimits(forget_again_s=1.0)


def two_nodes(units: int = 16):
    state = new_state(limits=LIMITS)
    for node in ("a", "b"):
        state.register(registration(node, units=units, ttl_s=5.0), 0.0)
    return state


def leased(state, *numbers: int, now: float, lease_s: float = 4.0, name: int = 0):
    return state.match(keys(*numbers), now, lease_s=lease_s, node_id="a", incarnation=1, lease_name=name).lease_id


def renewal(*lease_ids: int, node: str = "a", incarnation: int = 1, lease_s: float = 4.0) -> RenewRequest:
    return RenewRequest(node_id=node, incarnation=incarnation, lease_ids=list(lease_ids), lease_s=lease_s)


# --- given back without having been seen --------------------------------------------------------------------------


def test_a_lease_is_given_back_by_its_name():
    state = two_nodes()
    put(state, "a", [1], 0.0)
    assert leased(state, 1, now=0.0, name=7) and leased(state, 1, now=0.0, name=8)
    state.release([], 0.0, [7])
    assert state.num_read_leases == 1
    state.release([], 0.0, [7])
    assert state.num_read_leases == 1, "a name is one lease's"
    state.release([], 0.0, [8])
    assert state.num_read_leases == 0
    state.check_invariants(0.0)


def test_a_request_that_comes_after_its_lease_was_given_back_gets_none_but_its_answer():
    state = two_nodes()
    put(state, "a", [1], 0.0)
    state.release([], 0.0, [7])
    reply = state.match(keys(1), 0.0, lease_s=4.0, node_id="a", incarnation=1, lease_name=7)
    assert reply.replicas and reply.lease_id == 0
    assert state.counters["leases_given_back_unseen"] == 1


def named_write(number, name):
    return msgspec.structs.replace(reservation("a", [number]), write_name=name)


def test_what_was_reserved_by_a_name_is_given_back_by_it():
    state = two_nodes()
    first = granted(state.reserve(named_write(1, 7), 0.0))
    granted(state.reserve(named_write(2, 8), 0.0))
    state.release([], 0.0, [7])
    assert state.commit(ids("a", first), 0.0).committed == [False]
    assert state.stats(0.0, 0).reservations == 1
    state.check_invariants(0.0)


def test_a_reservation_that_comes_after_it_was_given_back_gets_no_room():
    state = two_nodes()
    state.release([], 0.0, [7])
    reply = state.reserve(named_write(1, 7), 0.0)
    assert granted(reply) == [] and state.counters["declined_given_back"] == 1
    assert state.stats(0.0, 0).reservations == 0


def test_a_reservation_that_ended_in_any_way_has_no_name_any_more():
    state = two_nodes()
    state.commit(ids("a", granted(state.reserve(named_write(1, 1), 0.0))), 0.0)
    state.abort(ids("a", granted(state.reserve(named_write(2, 2), 0.0))), 0.0)
    state.reserve(named_write(3, 3), 0.0)
    state.release_writer(ReleaseWriterRequest(node_id="a", incarnation=1), 1.0)
    assert state._reservations._by_name == {}
    state.check_invariants(1.0)


def test_a_lease_that_ended_in_any_way_has_no_name_any_more():
    state = two_nodes()
    put(state, "a", [1], 0.0)
    by_id = leased(state, 1, now=0.0, name=1)
    leased(state, 1, now=0.0, name=2, lease_s=1.0)
    leased(state, 1, now=0.0, name=3)
    state.release([by_id], 0.0)
    state.tick(2.0)
    state.release_writer(ReleaseWriterRequest(node_id="a", incarnation=1), 2.0)
    assert state.num_read_leases == 0 and state._reading.leases._by_name == {}


def test_names_that_never_come_are_forgotten_the_oldest_first():
    leases = ReadLeases(new_state()._index, max_given_back=3)
    for name in range(1, 6):
        assert leases.give_back(name) is None
    assert [leases.wanted(name) for name in range(1, 6)] == [True, True, False, False, False]


# --- renewed by the transfer alone ----------------------------------------------------------------------------------


def test_a_renewed_lease_lasts_on_and_one_that_is_not_ends():
    state = two_nodes()
    put(state, "a", [1], 0.0)
    kept, left = leased(state, 1, now=0.0, lease_s=1.0), leased(state, 1, now=0.0, lease_s=1.0)
    assert state.renew(renewal(kept, lease_s=1.0), 0.8).renewed == [True]
    state.tick(1.5)
    assert state.num_read_leases == 1
    assert state.renew(renewal(kept, left, lease_s=1.0), 1.5).renewed == [True, False]
    state.tick(2.4)
    assert state.num_read_leases == 1
    state.tick(2.6)
    assert state.num_read_leases == 0


def test_a_renewal_never_shortens():
    state = two_nodes()
    put(state, "a", [1], 0.0)
    lease = leased(state, 1, now=0.0)
    assert state.renew(renewal(lease, lease_s=0.5), 1.0).renewed == [True]
    state.tick(3.9)
    assert state.num_read_leases == 1


def test_only_the_node_that_holds_a_lease_renews_it():
    state = two_nodes()
    put(state, "a", [1], 0.0)
    lease = leased(state, 1, now=0.0)
    nobodys = state.match(keys(1), 0.0, lease_s=4.0).lease_id
    for who in ({"node": "b"}, {"incarnation": 2}, {"node": "x"}):
        assert state.renew(renewal(lease, nobodys, **who), 1.0).renewed == [False, False]
    assert state.renew(renewal(nobodys), 1.0).renewed == [False], "time alone ends it, so that nobody keeps room"
    state.tick(4.5)
    assert state.num_read_leases == 0


def test_no_look_renews_or_takes_a_lease():
    state = two_nodes()
    put(state, "a", [1], 0.0)
    leased(state, 1, now=0.0)
    for now in (1.0, 2.0, 3.0):
        state.match(keys(1), now, node_id="a", incarnation=1)
        state.complete_prefix(keys(1), now)
        assert state.num_read_leases == 1
    leased(state, 1, now=3.5)
    state.tick(4.1)
    assert state.num_read_leases == 1, "the first one ended in its time"


# --- room that is read ---------------------------------------------------------------------------------------------


def quarantine(state, replica, now):
    item = QuarantineItem(replica=replica, reason=QuarantineReason.CHECKSUM)
    state.quarantine(QuarantineRequest(items=[item]), now)


def free_units(state, node: str, now: float) -> int:
    (use,) = (use for use in state.stats(now, 0).segments if use.segment.node_id == node)
    return (use.segment.size_bytes - use.used_bytes) // UNIT


def test_room_of_a_refused_replica_is_not_used_while_others_read_there():
    state = two_nodes()
    (replica,) = put(state, "b", [1], 0.0, prefer="b.1")
    first, second = leased(state, 1, now=0.0, lease_s=60.0), leased(state, 1, now=0.0, lease_s=3.0)
    quarantine(state, replica, 0.0)
    assert not state.match(keys(1), 0.0).replicas, "nobody finds it any more"
    got = granted(state.reserve(reservation("a", list(range(10, 26)), prefer="b.1"), 0.0))
    assert all((r.segment_id, r.offset) != (replica.segment_id, replica.offset) for r in got)
    state.release([first], 1.0)
    state.heartbeat(ids_of("a"), 2.0)
    state.heartbeat(ids_of("b"), 2.0)
    for now in (1.0, 2.0, 2.9):
        assert retiring(state, "b", now) == UNIT
    assert retiring(state, "b", 4.1) == 0, "with the last lease, and a look a second later"
    state.release([second], 4.1)
    state.check_invariants(4.1)


def ids_of(node: str):
    return LeaveRequest(node_id=node, incarnation=1)


def retiring(state, node: str, now: float) -> int:
    state.check_invariants(now)
    (use,) = (use for use in state.stats(now, 0).segments if use.segment.node_id == node)
    return use.retiring_bytes


def test_room_of_a_refused_replica_that_nobody_reads_is_free_at_once_pinned_or_not():
    state = two_nodes()
    for number, pinned in ((1, False), (2, True)):
        (replica,) = put(state, "b", [number], 0.0, prefer="b.1")
        if pinned:
            state.pin(PinRequest(keys=keys(number)), 0.0)
        quarantine(state, replica, 0.0)
        assert (retiring(state, "b", 0.0), free_units(state, "b", 0.0)) == (0, 16)


def test_a_pinned_replica_that_is_refused_while_it_is_read_leaves_with_its_lease():
    state = two_nodes()
    (replica,) = put(state, "b", [1], 0.0, prefer="b.1")
    state.pin(PinRequest(keys=keys(1)), 0.0)
    lease = leased(state, 1, now=0.0, lease_s=60.0)
    quarantine(state, replica, 0.0)
    assert retiring(state, "b", 0.5) == UNIT
    state.release([lease], 0.5)
    assert retiring(state, "b", 1.0) == 0


# --- late writers --------------------------------------------------------------------------------------------------


def test_a_commit_after_its_time_is_refused_and_says_that_it_had_ended():
    state = two_nodes()
    replicas = granted(state.reserve(reservation("a", [1], ttl_s=1.0), 0.0))
    reply = state.commit(ids("a", replicas), 1.5)
    assert (reply.committed, reply.refusals) == ([False], [CommitRefusal.ENDED])
    done = granted(state.reserve(reservation("a", [2]), 1.5))
    assert state.commit(ids("a", done), 1.5).refusals == []
    both = state.commit(ids("a", [*done, *replicas]), 1.5)
    assert both.refusals == [CommitRefusal.NONE, CommitRefusal.ENDED]


def test_a_commit_of_a_node_that_was_given_up_is_refused_and_says_so():
    state = two_nodes()
    replicas = granted(state.reserve(reservation("a", [1], prefer="b.1"), 0.0))
    state.heartbeat(ids_of("b"), 4.0)
    reply = state.commit(ids("a", replicas), 6.0)
    assert (reply.committed, reply.refusals) == ([False], [CommitRefusal.WRITER_GONE])
    state.register(registration("a"), 6.0)
    assert state.commit(ids("a", replicas), 6.0).refusals == [CommitRefusal.ENDED], "it is back, its claim is not"


def lost(state, how: str) -> float:
    """Node a goes; returns when."""
    if how == "left":
        state.leave(LeaveRequest(node_id="a", incarnation=1), 1.0)
    elif how == "started again":
        state.register(registration("a", incarnation=2), 1.0)
    else:
        state.heartbeat(ids_of("b"), 4.0)
        state.tick(5.0)
        return 5.0
    return 1.0


def test_room_that_a_lost_node_may_still_be_writing_to_rests_until_its_writer_has_stopped():
    """It may reach the other node though we do not hear it, and writes until the reservation's own end."""
    for how in ("left", "started again", "silent"):
        state = two_nodes()
        (replica,) = granted(state.reserve(reservation("a", [1], prefer="b.1", ttl_s=20.0), 0.0))
        now = lost(state, how)
        assert state.num_reservations == 0
        while now < 22.0:
            assert retiring(state, "b", now) == UNIT, (how, now)
            now += 2.0
            state.heartbeat(ids_of("b"), now)
        assert retiring(state, "b", 22.5) == 0, how
        assert replica.segment_id == "b.1"


def test_room_of_an_engine_that_is_known_to_have_ended_rests_for_the_grace_time_alone():
    state = two_nodes()
    state.reserve(reservation("a", [1], prefer="b.1", ttl_s=20.0), 0.0)
    state.release_writer(ReleaseWriterRequest(node_id="a", incarnation=1), 1.0)
    assert retiring(state, "b", 2.9) == UNIT
    assert retiring(state, "b", 3.1) == 0


def test_room_rests_for_longer_than_a_late_write_takes_to_land():
    """The limits of those who write and of who hands the room out again, as they are by default."""
    store, limits, transfer = StoreConfig(), StoreLimits(), TransferLimits()
    late_s = max(
        transfer.tcp.late_s,
        transfer.ucx.handover.grace_s + transfer.ucx.close_s,
        transfer.nixl.handover.grace_s + transfer.nixl.others_s,
    )
    # A reservation whose time is up: its writer stopped before, at a share of it.
    assert (1.0 - limits.writable_share) * store.reserve_ttl_s + store.retire_grace_s > late_s
    # One that its writer gave back: its write had returned, and only what was on its way may land.
    assert store.retire_grace_s > transfer.tcp.late_s


def test_a_deadline_can_be_asked_for():
    deadlines = Deadlines()
    assert deadlines.at((0, "x")) is None
    deadlines.set((0, "x"), 2.0)
    deadlines.set((0, "x"), 3.0)
    assert deadlines.at((0, "x")) == 3.0
    assert list(deadlines.pop_due(2.5)) == [] and key(1)
