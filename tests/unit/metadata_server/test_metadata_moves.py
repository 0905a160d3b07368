"""Which chunks of a drained node are copied next, where to, and what happens to those that were."""

import random
from collections.abc import Sequence

from support.metadata_words import UNIT, granted, ids, key, keys, new_state, put, registration, reservation, stored

from kvcore.chunk_keys import owner_of
from kvcore.clock import ManualClock
from kvcore.types import ChunkKey
from metadata_server import cache_messages as c
from metadata_server import messages as m
from metadata_server.index.limits import IndexLimits
from metadata_server.index.state import MetadataState

NOW = ManualClock().now()


def cluster(*units: int, **settings: object) -> MetadataState:
    """Nodes a, b, ... with segments of so many chunks."""
    state = new_state(**settings)  # type: ignore[arg-type]
    for name, size in zip("abcdef", units, strict=False):
        state.register(registration(name, units=size), NOW)
    return state


def drain(state: MetadataState, node: str = "a", *, move: bool = True) -> None:
    state.orders.give(c.NodeOrderRequest(node_id=node, action="drain", move=move), None, 100.0)


def ask(
    state: MetadataState, copied: Sequence[ChunkKey] = (), *, now: float = NOW, most: int = 1 << 30
) -> c.MoveChunksReply:
    request = c.MoveChunksRequest(node_id="a", incarnation=1, copied=list(copied), most_bytes=most, ttl_s=5.0)
    return state.moves.next(request, now)


def commit(state: MetadataState, reply: c.MoveChunksReply, now: float = NOW) -> list[ChunkKey]:
    """All of the copies are there."""
    assert all(state.commit(ids("a", [move.target for move in reply.moves]), now).committed)
    return [move.target.key for move in reply.moves]


def lies_in(state: MetadataState, number: int, now: float = NOW) -> set[str]:
    return {replica.segment_id for replicas in state.match(keys(number), now).replicas for replica in replicas}


def test_all_chunks_are_copied_then_given_up_and_are_there_the_whole_time():
    state = cluster(8, 4, 4)
    numbers = [1, 2, 3, 4, 5, 6]
    put(state, "a", numbers, NOW, prefer="a.1")
    drain(state)
    reply = ask(state)
    assert reply.left == 6 and len(reply.moves) == 6
    assert all(move.source.segment_id == "a.1" != move.target.segment_id for move in reply.moves)
    assert {segment.id for segment in reply.segments} == {"b.1", "c.1"}
    assert stored(state, numbers, NOW) == numbers and lies_in(state, 1) == {"a.1"}
    copied = commit(state, reply)
    assert stored(state, numbers, NOW) == numbers and "a.1" in lies_in(state, 1)
    assert ask(state, copied).left == 0
    assert stored(state, numbers, NOW) == numbers and all("a.1" not in lies_in(state, n) for n in numbers)
    state.leave(m.LeaveRequest(node_id="a", incarnation=1), NOW)
    assert stored(state, numbers, NOW) == numbers
    state.check_invariants(NOW)


def test_where_there_is_not_room_for_all_the_most_used_are_copied_and_nothing_is_evicted():
    state = cluster(6, 4)
    put(state, "b", [11, 12], NOW, prefer="b.1")
    put(state, "a", [1, 2, 3, 4, 5], NOW, prefer="a.1")
    for number in (4, 2):
        state.match(keys(number), NOW)
    drain(state)
    reply = ask(state)
    assert {move.source.key for move in reply.moves} == set(keys(2, 4))
    copied = commit(state, reply)
    last = ask(state, copied)
    assert (last.moves, last.left) == ([], 3)
    assert stored(state, [1, 2, 3, 4, 5, 11, 12], NOW) == [1, 2, 3, 4, 5, 11, 12]
    state.check_invariants(NOW)


def test_what_lies_elsewhere_already_is_not_copied_and_what_another_drained_node_has_does_not_count():
    state = cluster(8, 8, 8, max_replicas=2)
    being_written = {name: granted(state.reserve(reservation(name, [1], prefer=f"{name}.1"), NOW)) for name in "ab"}
    for name, replicas in being_written.items():
        state.commit(ids(name, replicas), NOW)
    assert lies_in(state, 1) == {"a.1", "b.1"}
    drain(state)
    assert ask(state).left == 0
    drain(state, "b", move=False)
    (move,) = ask(state).moves
    assert move.target.segment_id == "c.1"


def test_a_chunk_that_is_being_read_is_copied_and_stays_until_it_is_not():
    state = cluster(4, 4)
    put(state, "a", [1], NOW, prefer="a.1")
    lease = state.match(keys(1), NOW, lease_s=9.0, node_id="b", incarnation=1).lease_id
    drain(state)
    copied = commit(state, ask(state))
    assert ask(state, copied).left == 0 and lies_in(state, 1) == {"a.1", "b.1"}
    state.release([lease], NOW)
    ask(state, copied)
    assert lies_in(state, 1) == {"b.1"}


def test_nothing_is_given_up_whose_copy_is_gone():
    state = cluster(4, 4)
    put(state, "a", [1], NOW, prefer="a.1")
    drain(state)
    copied = commit(state, ask(state))
    state.leave(m.LeaveRequest(node_id="b", incarnation=1), NOW)
    assert ask(state, copied).left == 1 and lies_in(state, 1) == {"a.1"}


def test_room_for_a_copy_that_never_came_runs_out_and_the_chunk_is_tried_again():
    state = cluster(4, 4)
    put(state, "a", [1], NOW, prefer="a.1")
    drain(state)
    assert len(ask(state).moves) == 1 and ask(state).moves == []
    later = NOW + 4.0
    state.heartbeat(m.HeartbeatRequest(node_id="a", incarnation=1), later)
    state.heartbeat(m.HeartbeatRequest(node_id="b", incarnation=1), later)
    assert len(ask(state, now=NOW + 8.0).moves) == 1
    state.check_invariants(NOW + 8.0)


def test_batches_have_a_bound_in_bytes_and_in_chunks():
    state = cluster(8, 8, limits=IndexLimits(max_moves=3))
    put(state, "a", [1, 2, 3, 4, 5], NOW, prefer="a.1")
    drain(state)
    assert len(ask(state, most=2 * UNIT).moves) == 2
    assert len(ask(state, most=1).moves) == 1, "one at least"
    assert len(ask(state).moves) == 2, "the rest"


def test_only_a_drained_node_is_told_anything():
    state = cluster(4, 4)
    put(state, "a", [1], NOW, prefer="a.1")
    assert ask(state).moves == []
    drain(state)
    other = c.MoveChunksRequest(node_id="a", incarnation=2, copied=[], most_bytes=1, ttl_s=1.0)
    assert state.moves.next(other, NOW).moves == [] and ask(state).moves


def test_a_chunk_knows_in_its_new_segment_what_it_continues():
    """A prefix is not evicted before its continuation there, either."""
    state = cluster(4, 4)
    request = m.ReserveRequest(
        node_id="a",
        incarnation=1,
        items=[m.ReserveItem(key=key(n), length=UNIT) for n in (1, 2)],
        prefer_segment="a.1",
        ttl_s=9.0,
        in_order=True,
    )
    state.commit(ids("a", granted(state.reserve(request, NOW))), NOW)
    drain(state)
    ask(state, commit(state, ask(state)))
    put(state, "b", [21, 22, 23], NOW, prefer="b.1")
    assert stored(state, [1, 2], NOW) != [2]
    state.check_invariants(NOW)


def test_after_any_sequence_of_moves_and_deaths_nothing_is_lost_that_had_a_copy_or_its_node():
    """Many small worlds: copies that are committed, aborted, or whose target dies."""
    for seed in range(60):
        rng = random.Random(seed)
        state = cluster(8, rng.randrange(2, 8), rng.randrange(2, 8))
        numbers = list(range(1, rng.randrange(3, 9)))
        put(state, "a", numbers, NOW, prefer="a.1")
        drain(state)
        copied: list[ChunkKey] = []
        lost: set[int] = set()
        for _ in range(6):
            reply = ask(state, copied, most=rng.randrange(1, 5) * UNIT)
            chosen = [move.target for move in reply.moves if rng.random() < 0.7]
            refused = [move.target for move in reply.moves if move.target not in chosen]
            done = state.commit(ids("a", chosen), NOW).committed
            copied = [one.key for one, was in zip(chosen, done, strict=True) if was]
            state.abort(ids("a", refused), NOW)
            if rng.random() < 0.2:
                lost |= {n for n in numbers if lies_in(state, n) == {"c.1"}}
                state.leave(m.LeaveRequest(node_id="c", incarnation=1), NOW)
                state.register(registration("c", units=4), NOW)
            state.check_invariants(NOW)
        assert set(numbers) - set(stored(state, numbers, NOW)) <= lost, f"seed {seed}"


def test_a_copy_counts_for_its_tenant_who_gets_no_more_than_its_share_of_the_other_segment():
    tenant, other = owner_of(b"a"), owner_of(b"b")
    state = cluster(8, 8, low_watermark=1.0, tenant_share=0.5)
    put(state, "b", [11], NOW, prefer="b.1", owner=tenant)
    put(state, "a", [1, 2, 3, 4], NOW, prefer="a.1", owner=tenant)
    put(state, "a", [5, 6], NOW, prefer="a.1", owner=other)
    drain(state)
    reply = ask(state)
    assert sorted(int.from_bytes(move.target.key, "little") for move in reply.moves) == [1, 2, 3, 5, 6]
    state.check_invariants(NOW)
    ask(state, commit(state, reply))
    state.check_invariants(NOW)
    put(state, "b", [12], NOW, prefer="b.1", owner=tenant)
    assert state.counters["evicted_own"] == 1 and stored(state, [5, 6], NOW) == [5, 6]
