"""Segments are evened out: which shed, down to what, that a run ends. How far a node's chunks are looked through."""

import random
from collections.abc import Sequence

import pytest
from support.metadata_words import UNIT, granted, ids, key, keys, new_state, put, registration, reservation, stored

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


def start(state: MetadataState, most: int = 0) -> c.RebalanceReply:
    return state.moves.order(c.RebalanceRequest(action="start", most_bytes=most), NOW)


def sheds(state: MetadataState, node: str = "a", now: float = NOW) -> bool:
    return state.heartbeat(m.HeartbeatRequest(node_id=node, incarnation=1), now).sheds


def ask(
    state: MetadataState, copied: Sequence[ChunkKey] = (), *, node: str = "a", now: float = NOW, most: int = 1 << 30
) -> c.MoveChunksReply:
    request = c.MoveChunksRequest(node_id=node, incarnation=1, copied=list(copied), most_bytes=most, ttl_s=5.0)
    return state.moves.next(request, now)


def commit(state: MetadataState, reply: c.MoveChunksReply, node: str = "a") -> list[ChunkKey]:
    """All of the copies are there."""
    assert all(state.commit(ids(node, [move.target for move in reply.moves]), NOW).committed)
    return [move.target.key for move in reply.moves]


def move_all(state: MetadataState, node: str = "a", most: int = 1 << 30) -> int:
    """As the node does it, until it is told to stop and all of its copies are told of. Returns how many were moved."""
    copied: list[ChunkKey] = []
    moved = 0
    while sheds(state, node) or copied:
        reply = ask(state, copied, node=node, most=most)
        copied = commit(state, reply, node) + reply.in_use
        moved += len(reply.moves)
        if not reply.moves and reply.in_use:
            break
    return moved


def fills(state: MetadataState) -> dict[str, int]:
    """Chunks in each node's segment."""
    return {one.segment.node_id: one.num_replicas for one in state.stats(NOW, 0).segments}


def in_node(state: MetadataState, number: int) -> set[str]:
    return {replica.segment_id[0] for replicas in state.match(keys(number), NOW).replicas for replica in replicas}


def test_full_segments_shed_until_all_are_as_full_within_the_tolerance_and_nothing_is_lost():
    state = cluster(100, 100, 100)
    numbers = list(range(1, 91))
    put(state, "a", numbers, NOW, prefer="a.1")
    plan = state.moves.look(None, NOW)
    assert not plan.running and plan.to_move_bytes == 60 * UNIT and plan.share == pytest.approx(0.3)
    begun = start(state)
    assert begun.running and begun.most_bytes == 60 * UNIT
    assert sheds(state) and not sheds(state, "b")
    moved = move_all(state, most=7 * UNIT)
    assert moved == 60 and not sheds(state)
    assert fills(state) == {"a": 30, "b": 30, "c": 30}
    assert stored(state, numbers, NOW) == numbers and all(len(in_node(state, n)) == 1 for n in numbers)
    over = state.moves.look(None, NOW)
    assert (over.running, over.moved_chunks, over.moved_bytes, over.to_move_bytes) == (False, 60, 60 * UNIT, 0)
    state.check_invariants(NOW)


def test_segments_of_different_sizes_become_equally_full_by_share():
    state = cluster(100, 40, 200)
    put(state, "a", list(range(1, 86)), NOW, prefer="a.1")
    start(state)
    move_all(state)
    shares = {name: count / size for (name, count), size in zip(fills(state).items(), (100, 40, 200), strict=True)}
    assert max(shares.values()) - min(shares.values()) <= 1 / 40, shares


def test_what_is_used_most_is_moved_first_and_no_more_than_was_said():
    state = cluster(100, 100)
    put(state, "a", list(range(1, 81)), NOW, prefer="a.1")
    for number in (7, 50, 3):
        state.match(keys(number), NOW)
    start(state, 3 * UNIT)
    assert move_all(state) == 3
    assert {n for n in range(1, 81) if in_node(state, n) == {"b"}} == {3, 7, 50}
    assert state.moves.look(None, NOW).end == "all was moved that was to be"


def test_even_segments_shed_nothing_and_a_run_over_them_is_over_at_once():
    state = cluster(100, 100)
    put(state, "a", list(range(1, 41)), NOW, prefer="a.1")
    put(state, "b", list(range(41, 75)), NOW, prefer="b.1")
    begun = start(state)
    assert not begun.running and begun.end == "no segment can shed more" and not sheds(state)


def test_a_run_that_is_stopped_moves_nothing_more_and_what_was_copied_is_given_up():
    state = cluster(100, 100)
    put(state, "a", list(range(1, 81)), NOW, prefer="a.1")
    start(state)
    copied = commit(state, ask(state, most=5 * UNIT))
    state.moves.order(c.RebalanceRequest(action="stop"), NOW)
    assert not sheds(state)
    assert ask(state, copied).moves == [] and fills(state) == {"a": 75, "b": 5}
    assert state.moves.look(None, NOW).end == "it was stopped"


def test_what_is_read_or_pinned_stays_and_a_copy_of_what_is_read_meanwhile_is_given_up_later():
    state = cluster(20, 20, low_watermark=1.0, pin_share=0.5)
    put(state, "a", list(range(1, 17)), NOW, prefer="a.1")
    state.pin(c.PinRequest(keys=keys(1)), NOW)
    lease = state.match(keys(2), NOW, lease_s=60.0, node_id="b", incarnation=1).lease_id
    start(state)
    reply = ask(state)
    taken = [move.source.key for move in reply.moves]
    assert len(taken) == 8 and not {key(1), key(2)} & set(taken)
    copied = commit(state, reply)
    second = state.match([copied[0]], NOW, lease_s=60.0, node_id="b", incarnation=1).lease_id
    again = ask(state, copied)
    assert again.in_use == [copied[0]] and again.moves == [], "what is to leave still is not replaced"
    state.release([lease, second], NOW)
    assert ask(state, again.in_use).in_use == [] and fills(state) == {"a": 8, "b": 8}


def test_a_drained_node_neither_sheds_nor_takes_by_rebalance():
    state = cluster(100, 100, 100)
    put(state, "a", list(range(1, 91)), NOW, prefer="a.1")
    state.orders.give(c.NodeOrderRequest(node_id="b", action="drain"), None, 100.0)
    start(state)
    move_all(state)
    assert fills(state) == {"a": 45, "b": 0, "c": 45}
    state = cluster(100, 100)
    put(state, "a", list(range(1, 91)), NOW, prefer="a.1")
    start(state)
    state.orders.give(c.NodeOrderRequest(node_id="a", action="drain"), None, 100.0)
    assert not sheds(state) and not state.moves.look(None, NOW).running


def test_a_run_ends_when_its_node_dies_and_when_nobody_moves_anything():
    state = cluster(100, 100)
    put(state, "a", list(range(1, 91)), NOW, prefer="a.1")
    start(state)
    state.leave(m.LeaveRequest(node_id="a", incarnation=1), NOW)
    assert not state.moves.look(None, NOW).running
    state = cluster(100, 100)
    put(state, "a", list(range(1, 91)), NOW, prefer="a.1")
    start(state)
    for now in range(int(NOW), int(NOW) + 62, 2):
        for name in "ab":
            state.heartbeat(m.HeartbeatRequest(node_id=name, incarnation=1), now)
    assert state.moves.look(None, NOW + 60.0).running
    assert state.moves.look(None, NOW + 61.0).end == "nothing was moved for 60 s"


def test_where_nobody_has_room_a_run_ends_instead_of_going_on_for_ever():
    """The other segment has no extent as long as these chunks."""
    state = cluster(100, 4)
    put(state, "a", [1, 2, 3], NOW, prefer="a.1", units=30)
    start(state)
    assert move_all(state) == 0 and not state.moves.look(None, NOW).running


# --- looking through a segment ------------------------------------------------------------------------------------


def drain(state: MetadataState, node: str = "a") -> None:
    state.orders.give(c.NodeOrderRequest(node_id=node, action="drain", move=True), None, 100.0)


SMALL = IndexLimits(max_moves=4, rows_a_move=8)


def test_a_call_looks_at_few_chunks_and_the_next_one_goes_on_where_it_ended():
    state = cluster(64, 64, 64, max_replicas=2, limits=SMALL)
    put(state, "a", list(range(1, 41)), NOW, prefer="a.1")
    drain(state)
    record = state.moves._nodes.segments["a.1"]
    listed, complete = [], record.complete

    def counted():
        for row in complete():
            listed.append(row)
            yield row

    record.complete = counted  # type: ignore[method-assign]
    copied: list[ChunkKey] = []
    for call in range(10):
        reply = ask(state, copied)
        assert len(reply.moves) == 4 and reply.left == 40 - 4 * call, call
        copied = commit(state, reply)
        assert len(listed) == 40, "all were listed once, for all of these calls"
    assert ask(state, copied).left == 0 and not fills(state)["a"]


def test_where_nothing_of_what_was_looked_at_is_to_move_it_says_to_ask_again():
    state = cluster(64, 64, 64, max_replicas=2, limits=SMALL)
    put(state, "a", [41], NOW, prefer="a.1")
    twice = {
        name: granted(state.reserve(reservation(name, list(range(1, 41)), prefer=f"{name}.1"), NOW)) for name in "ab"
    }
    for name, replicas in twice.items():
        state.commit(ids(name, replicas), NOW)
    drain(state)
    for call in range(5):
        reply = ask(state)
        assert reply.moves == [] and reply.more and reply.left == 41 - 8 * (call + 1)
    (move,) = ask(state).moves
    assert move.source.key == key(41)


def test_a_copy_that_failed_is_counted_as_left_until_it_was_made():
    state = cluster(64, 64, limits=SMALL)
    put(state, "a", list(range(1, 7)), NOW, prefer="a.1")
    drain(state)
    first = ask(state)
    second = ask(state, commit(state, first))
    state.abort(ids("a", [move.target for move in second.moves]), NOW)
    third = ask(state)
    assert len(second.moves) == 2 == len(third.moves) == third.left
    assert ask(state).left == 2, "it may yet fail"
    assert ask(state, commit(state, third)).left == 0


def test_what_a_rebalance_passed_over_is_left_for_a_drain_that_follows():
    state = cluster(24, 24, low_watermark=1.0, limits=SMALL)
    put(state, "a", list(range(1, 21)), NOW, prefer="a.1")
    state.match(keys(*range(1, 21)), NOW, lease_s=60.0, node_id="b", incarnation=1)
    start(state)
    while ask(state).more:  # what is being read does not shed
        pass
    drain(state)
    reply = ask(state)
    assert reply.left == 20 and len(reply.moves) == 4, "who stops the node now would lose them"


def test_a_pass_that_granted_something_does_not_say_that_all_is_done():
    state = cluster(64, 64, 64, max_replicas=2, limits=SMALL)
    wanted = {name: reservation(name, list(range(1, 11)), prefer=f"{name}.1") for name in "ab"}
    twice = {name: granted(state.reserve(request, NOW)) for name, request in wanted.items()}
    for name, replicas in twice.items():
        state.commit(ids(name, replicas), NOW)
    put(state, "a", [41], NOW, prefer="a.1")
    drain(state)
    first = ask(state)
    assert [move.source.key for move in first.moves] == keys(41) and first.more
    state.abort(ids("a", [move.target for move in first.moves]), NOW)
    assert ask(state).left > 0, "the rest lies elsewhere, but that copy has failed"


def test_after_any_sequence_every_chunk_is_there_once_its_copies_were_told_of():
    """Many small worlds: copies committed, aborted, told of late or twice; uses, new chunks, runs begun and stopped."""
    for seed in range(60):
        rng = random.Random(seed)
        state = cluster(24, 24, 30, low_watermark=1.0, limits=IndexLimits(max_moves=5, rows_a_move=7))
        numbers = list(range(1, rng.randrange(12, 24)))
        put(state, "a", numbers, NOW, prefer="a.1")
        copied: dict[ChunkKey, None] = {}
        for _ in range(25):
            match rng.randrange(5):
                case 0:
                    start(state, rng.choice([0, 3 * UNIT, 8 * UNIT]))
                case 1:
                    state.match(keys(rng.choice(numbers)), NOW)
                case 2 if rng.random() < 0.2:
                    state.moves.order(c.RebalanceRequest(action="stop"), NOW)
                case _:
                    reply = ask(state, list(copied), most=rng.randrange(1, 5) * UNIT)
                    chosen = [move.target for move in reply.moves if rng.random() < 0.7]
                    state.abort(ids("a", [move.target for move in reply.moves if move.target not in chosen]), NOW)
                    state.commit(ids("a", chosen), NOW)
                    copied = dict.fromkeys([*reply.in_use, *(move.source.key for move in reply.moves)])
            state.check_invariants(NOW)
            assert stored(state, numbers, NOW) == numbers, f"seed {seed}"
        state.moves.order(c.RebalanceRequest(action="stop"), NOW)
        while copied:
            copied = dict.fromkeys(ask(state, list(copied)).in_use)
        assert all(len(in_node(state, n)) == 1 for n in numbers), f"seed {seed}"
