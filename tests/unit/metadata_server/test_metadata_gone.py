"""Nodes that are gone: what they held is found by nobody at once, and forgotten in slices."""

import asyncio
import random
from collections.abc import Iterable

import msgspec
import pytest
from support.metadata_rigs import end
from support.metadata_words import ids, key, keys, new_state, put, registration, reservation, stored

from kvcore.clock import SystemClock
from metadata_server.core import MetadataCore
from metadata_server.index.event_log import EventLog
from metadata_server.index.limits import IndexLimits
from metadata_server.index.state import MetadataState
from metadata_server.index.tier_holdings import TierHoldings
from metadata_server.messages import (
    Event,
    EventKind,
    LeaveRequest,
    ReserveStatus,
    TellHoldingsRequest,
)

MANY = list(range(40))


def with_two_copies() -> MetadataState:
    """40 chunks on `a`, of which `b` has the first 10, too; slices of 8."""
    state = new_state(limits=IndexLimits(most_swept=8), max_replicas=2)
    for node in ("a", "b"):
        state.register(registration(node, units=64), 0.0)
    both = reservation("a", MANY[:10], prefer="a.1"), reservation("b", MANY[:10], prefer="b.1")
    replies = [state.reserve(request, 0.0) for request in both]
    for node, reply in zip(("a", "b"), replies, strict=True):
        state.commit(ids(node, [outcome.replica for outcome in reply.outcomes]), 0.0)
    put(state, "a", MANY[10:], 0.0)
    assert {ref.segment_id for refs in state.match(keys(*MANY), 0.0).replicas for ref in refs} == {"a.1", "b.1"}
    return state


def test_nobody_finds_what_a_gone_node_held_while_it_is_forgotten_in_slices() -> None:
    state = with_two_copies()
    state.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    slices = 0
    while state.sweep():
        slices += 1
        for numbers in (MANY[:10], MANY[10 + slices :], MANY):
            reply = state.match(keys(*numbers), 0.0, in_order=True)
            assert {ref.segment_id for refs in reply.replicas for ref in refs} <= {"b.1"}
            assert len(reply.replicas) == len(set(numbers) & set(MANY[:10]))
        state.check_invariants(0.0)
    assert slices >= 1 and state.num_objects == 10 and stored(state, MANY, 0.0) == MANY[:10]
    state.check_invariants(0.0)


@pytest.mark.parametrize("asked", ["reserve", "complete_prefix", "match"])
def test_a_lookup_comes_before_the_slices(asked: str) -> None:
    state = with_two_copies()
    state.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    assert state.num_objects > 10, "it is not all forgotten at once"
    if asked == "reserve":
        outcomes = state.reserve(reservation("b", MANY[10:20]), 0.0).outcomes
        assert {outcome.status for outcome in outcomes} == {ReserveStatus.GRANTED}
    elif asked == "complete_prefix":
        assert state.complete_prefix(keys(20), 0.0) == 0
    else:
        assert state.match(keys(*MANY[5:]), 0.0).num_writing == 0
    state.check_invariants(0.0)


def test_a_slice_is_no_larger_than_the_bound_and_each_ends_something() -> None:
    state = new_state(limits=IndexLimits(most_swept=8))
    state.register(registration("a", units=64), 0.0)
    put(state, "a", MANY, 0.0)
    state.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    left = [state.num_objects]
    while state.sweep():
        left.append(state.num_objects)
    left.append(state.num_objects)
    assert left == [40, 32, 24, 16, 8, 0]
    assert not state.sweep()


def test_a_lease_outlives_its_segment_and_its_row_is_not_used_again_before_its_end() -> None:
    state = with_two_copies()
    reply = state.match(keys(*MANY[10:]), 0.0, lease_s=60.0, node_id="b", incarnation=1)
    state.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    state.release([reply.lease_id], 0.0)  # before the slices
    while state.sweep():
        state.check_invariants(0.0)
    again = with_two_copies()
    reply = again.match(keys(*MANY[10:]), 0.0, lease_s=60.0, node_id="b", incarnation=1)
    again.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    while again.sweep():
        again.check_invariants(0.0)
    again.release([reply.lease_id], 0.0)  # after them
    again.check_invariants(0.0)


def test_a_node_that_comes_back_at_once_has_what_it_tells_and_nothing_else() -> None:
    state = with_two_copies()
    before = state.log.next_seq
    state.register(registration("a", units=64, incarnation=2), 0.0)
    put(state, "b", MANY[10:12], 0.0)
    while state.sweep():
        pass
    assert stored(state, MANY, 0.0) == MANY[:12]
    told = [event for event in state.log.since(before) if event.kind is EventKind.REMOVED]
    assert told == [], "the node's end stands for them"


def test_a_segment_that_its_node_has_no_more_is_told_at_once() -> None:
    state = with_two_copies()
    before = state.log.next_seq
    state.register(msgspec.structs.replace(registration("a", units=64), segments=[]), 0.0)
    removed = [k for event in state.log.since(before) if event.kind is EventKind.REMOVED for k in event.keys]
    assert sorted(removed) == sorted(keys(*MANY)) and stored(state, MANY, 0.0) == MANY[:10]


async def test_the_running_server_forgets_in_slices_and_answers_between_them() -> None:
    state, clock = new_state(limits=IndexLimits(most_swept=4)), SystemClock()
    core = MetadataCore(state, clock)
    state.register(registration("a", units=64), clock.now())
    put(state, "a", MANY, clock.now())
    state.leave(LeaveRequest(node_id="a", incarnation=1), clock.now())
    ticking = asyncio.create_task(core.run())
    seen = []
    async with asyncio.timeout(60):
        while state.num_objects:
            seen.append(state.num_objects)
            await asyncio.sleep(0)
    await end(ticking)
    assert len(seen) >= 8, "nobody else had a turn"


def follow(told: dict[str, set[bytes]], events: Iterable[Event]) -> None:
    """What lies on disks, as a subscriber learns it."""
    for event in events:
        keys = told.setdefault(event.node_id, set())
        if event.kind is EventKind.ON_DISK:
            keys.update(event.keys)
        elif event.keys:
            keys.difference_update(event.keys)
        else:
            keys.clear()


def test_what_lies_on_disks_is_as_a_plain_table_says_whatever_comes_and_goes() -> None:
    rng = random.Random(5)
    for most_swept in (0, 10_000):
        holdings, plain = TierHoldings(IndexLimits(most_swept=most_swept)), dict[str, set[bytes]]()
        log, told = EventLog("e", 10_000), dict[str, set[bytes]]()
        universe = [bytes([rng.randrange(256)]) + key(n)[1:] for n in range(200)]
        for _ in range(400):
            node, some = f"n{rng.randrange(6)}", rng.sample(universe, 20)
            action = rng.randrange(4)
            if action == 0:
                request = TellHoldingsRequest(node_id=node, incarnation=1, added=some, reset=rng.random() < 0.3)
                holdings.note(request, log)
                plain[node] = ({*some} | plain.get(node, set())) if not request.reset else {*some}
            elif action == 1:
                holdings.note(TellHoldingsRequest(node_id=node, incarnation=1, removed=some), log)
                plain.get(node, set()).difference_update(some)
            elif action == 2 and rng.random() < 0.5:
                holdings.drop(node)
                log.append(EventKind.NODE_DOWN, node)
                plain.pop(node, None)
            else:
                holdings.sweep()
            for k in rng.sample(universe, 10):
                having = sorted(name for name, keys_of in plain.items() if k in keys_of)
                assert [sorted(found) for found in holdings.find([k])] == ([having] if having else [])
        follow(told, log.since(1))
        assert {name: keys for name, keys in told.items() if keys} == {n: keys for n, keys in plain.items() if keys}
        snapshot, begun = dict[str, set[bytes]](), log.snapshot([], [], holdings.told())
        follow(snapshot, [event for batch in begun for event in batch.events])
        assert snapshot == {name: keys for name, keys in told.items() if keys}
        while holdings.sweep():
            pass
        assert len(holdings) == len(set().union(*plain.values())), "dead bits are cleared, and counted out"


def test_a_key_costs_its_holders_however_many_nodes_there_are() -> None:
    """A snapshot of a thousand nodes' disks kept the server for seconds a table."""

    class Counting(list[str | None]):
        looked_up = 0

        def __getitem__(self, at):
            self.looked_up += 1
            return super().__getitem__(at)

        def __iter__(self):
            raise AssertionError("all nodes were looked at")

    holdings = TierHoldings(IndexLimits())
    for number in range(1000):
        holdings.add(f"n{number}", [key(number), key(number + 1)])
    nodes = holdings._nodes = Counting(holdings._nodes)
    assert holdings.find([key(500), key(0), key(1000)]) == [["n499", "n500"], ["n0"], ["n999"]]
    assert nodes.looked_up == 4
    assert sum(len(keys) for _, keys in holdings.told()) == 2000
