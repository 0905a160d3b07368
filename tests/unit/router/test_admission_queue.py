"""Whose turn is next, and when a first token can be expected: the pure parts of admission."""

import pytest
from msgspec.structs import replace

from kvcore.types import Role, Route
from router.admission.fair_queue import FairQueue, Waiter
from router.admission.forecast import forecast
from router.admission.limits import AdmissionLimits
from router.routing.decision import Decision, Ranking
from router.routing.views import NodeView

LIMITS = AdmissionLimits()


def queued(queue: FairQueue, *asked: tuple[str, float], rank: int = 1) -> None:
    for flow, cost in asked:
        queue.add(Waiter(flow, rank, cost, int(cost), 1))


def served(queue: FairQueue, count: int) -> str:
    turns = []
    for _ in range(count):
        waiter = queue.next()
        assert waiter is not None
        queue.take(waiter)
        turns.append(waiter.flow)
    return "".join(turns)


def test_who_asks_more_gets_no_more():
    queue = FairQueue(10, saved=0)
    queued(queue, *[("a", 100.0)] * 20, *[("b", 100.0)] * 5)
    assert served(queue, 10).count("b") == 5
    assert served(queue, 15) == "a" * 15 and queue.next() is None


def test_shares_are_of_work_not_of_requests():
    queue = FairQueue(10, saved=0)
    queued(queue, *[("a", 400.0)] * 20, *[("b", 100.0)] * 20)
    assert served(queue, 20).count("b") == pytest.approx(16, abs=1)


def test_who_has_asked_for_less_than_its_share_goes_first():
    queue = FairQueue(10)
    queued(queue, *[("a", 100.0)] * 20)
    served(queue, 10)
    queued(queue, *[("b", 100.0)] * 3)
    assert served(queue, 3) == "bbb"


def test_what_is_saved_up_is_bounded():
    queue = FairQueue(10, saved=2)
    queued(queue, *[("a", 100.0)] * 100)
    served(queue, 50)
    queued(queue, *[("b", 100.0)] * 50)
    assert 20 <= served(queue, 40).count("b") <= 22, "half, and the two that were saved up"


def test_priorities_are_strict_and_within_a_flow_the_first_comes_first():
    queue = FairQueue(10)
    queued(queue, ("a", 1.0), ("a", 2.0), rank=2)
    queued(queue, ("a", 3.0), rank=0)
    queued(queue, ("b", 4.0), rank=1)
    costs = []
    while (waiter := queue.next()) is not None:
        queue.take(waiter)
        costs.append(waiter.cost)
    assert costs == [3.0, 4.0, 1.0, 2.0]


def test_who_leaves_is_not_charged():
    queue = FairQueue(10, saved=0)
    queued(queue, ("a", 100.0))
    gone = [Waiter("a", 1, 1000.0, 1000, 1) for _ in range(3)]
    for waiter in gone:
        queue.add(waiter)
    queued(queue, ("a", 100.0), ("b", 100.0), ("b", 100.0))
    for waiter in gone:
        queue.leave(waiter)
        queue.leave(waiter)
    assert sorted(served(queue, 2)) == ["a", "b"] and sorted(served(queue, 2)) == ["a", "b"]


def test_flows_that_are_remembered_are_bounded():
    queue = FairQueue(3)
    for number in range(10):
        queue.passed(str(number), 1.0)
        queue.answered(str(number), 50)
    assert len(queue._flows) == 3
    assert queue.output_of("9", 1000) == 50 and queue.output_of("0", 1000) not in (50, 1000)


def test_who_asks_for_all_that_a_context_holds_is_charged_for_what_answers_have():
    queue = FairQueue(10, saved=0)
    assert queue.output_of("new", 100_000) == 256 and queue.output_of("new", 16) == 16
    for _ in range(200):
        queue.answered("old", 80)
    assert queue.output_of("new", 100_000) == pytest.approx(80, rel=0.01)
    queue.answered("new", 2000)
    assert queue.output_of("new", 100_000) == 2000


def prefiller(name: str, *, tokens: int = 0, rate: float = 1000.0, since: float = 0.0, prompts: int = 2) -> NodeView:
    load = {"prefill_tokens": tokens, "prefills": prompts if tokens else 0}
    return NodeView(name, Role.PREFILLER, b"kv", 16, 4096, prefill_rate=rate, computing_since=since, **load)


def decoder(name: str, *, sequences: int = 0, places: int = 4, stay_s: float = 2.0) -> NodeView:
    return NodeView(name, Role.DECODER, b"kv", 16, 4096, sequences, max_sequences=places, step_s=0.01, stay_s=stay_s)


def decided(prefillers: list[NodeView], decoders: list[NodeView], cached: int = 0) -> Decision:
    def ranking(role: Role, nodes: list[NodeView]) -> Ranking:
        return Ranking(role, nodes, [0.0] * len(nodes), (), (), (), 0, nodes)

    first = prefillers[0].id if prefillers else None
    route = Route(prefiller=first, decoder=decoders[0].id, expected_cached_tokens=cached, reason="no_prefix")
    return Decision(
        route, ranking(Role.DECODER, decoders), ranking(Role.PREFILLER, prefillers) if prefillers else None, ()
    )


def test_a_first_token_is_expected_when_a_node_is_free_and_has_computed_the_rest():
    busy = [prefiller("p0", tokens=500, since=9.9), prefiller("p1", tokens=800, since=9.6)]
    seen = forecast(decided(busy, [decoder("d0")], cached=100), 300, 10.0, LIMITS)
    assert not seen.has_room and seen.tokens == 200
    assert seen.own_s == pytest.approx(0.21)
    assert seen.wait_s(0, 0) == pytest.approx(0.4), "both are free then, one has 400 left of 500, the other of 800"
    assert seen.wait_s(1000, 2) == pytest.approx(0.9), "two nodes have 1000 more behind them"


def test_the_next_prompt_is_sent_when_the_one_before_is_nearly_done():
    decoders = [decoder("d0")]
    one = prefiller("p0", tokens=500, since=9.6, prompts=1)
    seen = forecast(decided([one], decoders), 10, 10.0, LIMITS)
    assert not seen.has_room and seen.look_in_s == pytest.approx(0.1 - LIMITS.ahead_s)
    assert forecast(decided([one], decoders), 10, 10.09, LIMITS).has_room
    assert forecast(decided([prefiller("p1", tokens=900), one], decoders), 10, 10.09, LIMITS).has_room
    two = forecast(decided([replace(one, prefills=2)], decoders), 10, 99.0, LIMITS)
    assert not two.has_room and two.look_in_s is None, "one that hangs gets no third"
    full = forecast(decided([one], [decoder("d0", sequences=9)]), 10, 10.0, LIMITS)
    assert not full.has_room and full.look_in_s is None, "time alone gives no place"


def test_a_node_that_hangs_is_not_taken_for_free():
    seen = forecast(decided([prefiller("p0", tokens=500)], [decoder("d0")]), 10, 1e6, LIMITS)
    assert not seen.has_room and seen.wait_s(0, 0) == pytest.approx(0.25)


def test_there_is_room_where_one_node_is_idle_or_not_known():
    for spare in (prefiller("p1"), prefiller("p1", tokens=5000, rate=0.0), prefiller("p1", tokens=10)):
        assert forecast(decided([prefiller("p0", tokens=500), spare], [decoder("d0")]), 9, 0.0, LIMITS).has_room


def test_decoders_without_a_place_are_waited_for_too():
    full = [decoder("d0", sequences=6, places=4), decoder("d1", sequences=4, places=4)]
    seen = forecast(decided([prefiller("p0")], full), 10, 0.0, LIMITS)
    assert not seen.has_room
    assert seen.wait_s(0, 1) == pytest.approx(4 / 4), "two too many, the waiting one and this one; four end in a second"
    assert forecast(decided([prefiller("p0")], [full[0], decoder("d1", sequences=3)]), 10, 0.0, LIMITS).has_room


def test_a_place_may_be_taken_ahead_by_what_must_be_computed_first():
    one = [decoder("d0", sequences=4, places=4, stay_s=2.0)]
    assert not forecast(decided([], one), 10, 0.0, LIMITS).has_room
    slow = [prefiller("p0", rate=100.0)]
    assert forecast(decided(slow, one), 100, 0.0, LIMITS).has_room, "two sequences end in the second that it takes"
    assert not forecast(decided(slow, [decoder("d0", sequences=5)]), 100, 0.0, LIMITS).has_room, "one more at most"


def named(queue: FairQueue, *asked: tuple[str, int]) -> dict[Waiter, str]:
    """Of one flow by their names, each with its priority."""
    found = {}
    for name, priority in asked:
        waiter = Waiter(name[0], 1, 100.0, 100, 1, priority=priority)
        queue.add(waiter)
        found[waiter] = name
    return found


def turns_of(queue: FairQueue, names: dict[Waiter, str]) -> list[str]:
    turns = []
    while (waiter := queue.next()) is not None:
        queue.take(waiter)
        turns.append(names[waiter])
    return turns


def test_a_flows_own_go_by_their_priority_the_lower_first_and_equal_ones_as_they_came():
    queue = FairQueue(10, saved=0)
    names = named(queue, ("a1", 0), ("a2", 5), ("a3", 0), ("a4", -3), ("a5", 5), ("a6", -3))
    assert turns_of(queue, names) == ["a4", "a6", "a1", "a3", "a2", "a5"]


def test_a_priority_takes_nothing_from_other_flows():
    """Its flow's turns are where they were; only who has them changes."""
    turns = []
    for priority in (0, -9):
        queue = FairQueue(10, saved=0)
        names = named(queue, ("a1", 0), ("b1", 0), ("a2", 0), ("b2", 0), ("a3", priority), ("b3", 0))
        turns.append(turns_of(queue, names))
    assert [turn[0] for turn in turns[0]] == [turn[0] for turn in turns[1]]
    assert turns[1][0] == "a3"


def test_whoever_leaves_gives_its_place_to_those_behind_it_alone():
    queue = FairQueue(10, saved=0)
    names = named(queue, ("a1", 0), ("a2", 0), ("a3", -1), ("b1", 0))
    first = next(waiter for waiter, name in names.items() if name == "a3")
    starts = {name: waiter.order[1] for waiter, name in names.items()}
    assert starts == {"a3": 0.0, "a1": 100.0, "a2": 200.0, "b1": 0.0}
    queue.leave(first)
    left = {name: waiter.order[1] for waiter, name in names.items() if name != "a3"}
    assert left == {"a1": 0.0, "a2": 100.0, "b1": 0.0}
    assert queue.start_of("a") == 200.0
