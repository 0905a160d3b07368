"""What a writer leaves behind when its engine dies, and what an earlier life of the server leaves behind."""

from support.metadata_words import FIRST_GENERATION, granted, ids, keys, new_state, put, registration, reservation

from kvcore.clock import ManualClock
from metadata_server.cache_messages import ReleaseWriterRequest
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.messages import HeartbeatRequest


def release(node_id: str, incarnation: int = 1) -> ReleaseWriterRequest:
    return ReleaseWriterRequest(node_id=node_id, incarnation=incarnation)


def test_a_dead_engine_gives_up_its_reservations_and_leases_but_not_its_chunks() -> None:
    state = new_state()
    for node in ("a", "b"):
        state.register(registration(node), 0.0)
    put(state, "a", [1], 0.0)
    mine = granted(state.reserve(reservation("a", [2, 3], prefer="b.1"), 0.0))
    theirs = granted(state.reserve(reservation("b", [4]), 0.0))
    state.match(keys(1), 0.0, lease_s=60.0, node_id="a", incarnation=1)
    kept = state.match(keys(1), 0.0, lease_s=60.0, node_id="b", incarnation=1).lease_id
    state.release_writer(release("a"), 1.0)
    assert (state.num_reservations, state.num_read_leases) == (1, 1)
    assert state.commit(ids("a", mine), 1.0).committed == [False, False]
    assert state.commit(ids("b", theirs), 1.0).committed == [True]
    assert state.match(keys(1), 1.0).replicas, "what was committed is as good as ever"
    retiring = {record.segment.node_id: record.retiring_bytes for record in state.stats(1.0, 0).segments}
    assert retiring["a"] == 0 < retiring["b"], "a write to b may still be landing"
    state.tick(3.0)
    assert all(record.retiring_bytes == 0 for record in state.stats(3.0, 0).segments)
    state.release([kept], 3.0)
    state.check_invariants(3.0)


def test_a_release_of_another_life_or_of_nobody_changes_nothing_and_twice_is_once() -> None:
    state = new_state()
    state.register(registration("a", incarnation=2), 0.0)
    replicas = granted(state.reserve(reservation("a", [1], incarnation=2), 0.0))
    state.release_writer(release("a", 1), 0.0)
    state.release_writer(release("x"), 0.0)
    assert state.commit(ids("a", replicas, 2), 0.0).committed == [True]
    state.reserve(reservation("a", [2], incarnation=2), 0.0)
    for _ in range(2):
        state.release_writer(release("a", 2), 0.0)
        assert state.num_reservations == 0
    state.check_invariants(0.0)


def test_what_a_hung_engine_held_rests_for_as_long_as_it_might_write() -> None:
    state = new_state()
    for node in ("a", "b"):
        state.register(registration(node), 0.0)
    mine = granted(state.reserve(reservation("a", [2, 3], prefer="b.1", ttl_s=60.0), 0.0))
    state.match(keys(1), 0.0, lease_s=60.0, node_id="a", incarnation=1)
    state.release_writer(ReleaseWriterRequest(node_id="a", incarnation=1, hangs=True), 1.0)
    assert (state.num_reservations, state.num_read_leases) == (0, 0)
    assert state.commit(ids("a", mine), 1.0).committed == [False, False], "it wakes too late"

    def resting(now: float) -> int:
        state.tick(now)
        return sum(record.retiring_bytes for record in state.stats(now, 0).segments)

    for node in ("a", "b"):
        state.heartbeat(HeartbeatRequest(node_id=node, incarnation=1), 4.0)
    assert resting(4.5) > 0, "two seconds after a death it would be given out"
    granted(state.reserve(reservation("a", [2, 3]), 4.5))
    state.check_invariants(4.5)


async def test_the_client_reaches_it() -> None:
    state, clock = new_state(), ManualClock()
    core = MetadataCore(state, clock)

    class Local:
        async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
            return await core.dispatch(path, body)

        async def aclose(self) -> None:
            pass

    state.register(registration("a"), clock.now())
    state.reserve(reservation("a", [1]), clock.now())
    await MetadataClient(Local(), clock, 1.0).release_writer(release("a"))
    assert state.num_reservations == 0


def test_ids_of_an_earlier_life_of_the_server_are_unknown_in_this_one() -> None:
    before, after = new_state(epoch="e1"), new_state(epoch="e2", first_generation=FIRST_GENERATION + (1 << 20))
    for state in (before, after):
        state.register(registration("a"), 0.0)
    old = granted(before.reserve(reservation("a", [1, 2]), 0.0))
    before.commit(ids("a", old[:1]), 0.0)
    old_lease = before.match(keys(1), 0.0, lease_s=60.0).lease_id
    new = granted(after.reserve(reservation("a", [1, 2]), 0.0))
    assert after.commit(ids("a", old), 0.0).committed == [False, False]
    after.abort(ids("a", old), 0.0)
    assert after.commit(ids("a", new), 0.0).committed == [True, True]
    lease = after.match(keys(1), 0.0, lease_s=60.0).lease_id
    after.release([old_lease], 0.0)
    assert after.num_read_leases == 1
    after.release([lease], 0.0)
    after.check_invariants(0.0)
