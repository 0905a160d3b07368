"""A choice among many nodes that looks at a few of them is as good as one that looks at each."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kvcore.config.routing import RoutingPolicy
from kvcore.types import Role
from router.documents.hits import DocumentHits
from router.routing.decision import MAX_EXPLAINED, Ranking
from router.routing.index import PrefixHits
from router.routing.policy import make_policy
from router.routing.shortlist import FEW, MANY, shortlist
from router.routing.views import ClusterView, NodeKind, NodeView, NodeViews, RouteRequest, TierRates, ToldWork

KIND, CHUNK = b"f" * 16, 16
BY_LOAD = [RoutingPolicy.PREFIX_AWARE, RoutingPolicy.LEAST_LOADED]


def views(nodes: list[NodeView]) -> NodeViews:
    """As a board has them."""
    return NodeViews.made(
        nodes,
        {NodeKind.of(node) for node in nodes},
        sorted((node.load, number, node) for number, node in enumerate(nodes)),
        {node.id: number for number, node in enumerate(nodes)},
    )


def some(role: Role, count: int, dice: random.Random) -> list[NodeView]:
    """Few different loads, so that many are equal; hardly any is idle, some, or nearly all."""
    idle = dice.choice((0.0, 0.05, 0.5, 0.98))

    def one(number: int) -> NodeView:
        prefills = 0 if dice.random() < idle else dice.choice((1, 2))
        told = dice.choice((None, None, None, ToldWork(at=3.0), ToldWork(1, 900.0, 3.0)))
        return NodeView(
            f"{role}{number}",
            role,
            KIND,
            CHUNK,
            4096,
            sequences=0 if dice.random() < idle else dice.randrange(3),
            prefill_tokens=prefills * dice.choice((400, 800)),
            prefills=prefills,
            computing_since=dice.choice((1.0, 4.0)),
            prefill_rate=100.0,
            told=told,
            tiers=TierRates("disk", 1e6) if dice.random() < 0.3 else TierRates(),
        )

    return [one(number) for number in range(count)]


def hits_on(nodes: list[NodeView], dice: random.Random) -> PrefixHits:
    longest, holders = dice.randrange(1, 20), dice.sample(nodes, dice.choice((0, 1, 5, FEW + 5)))
    return PrefixHits(
        longest,
        {node.id: dice.randrange(1, longest + 1) for node in holders},
        each_its_own=dice.random() < 0.3,
        on_disk={node.id: dice.randrange(1, 5) for node in dice.sample(nodes, 2)} if dice.random() < 0.3 else {},
        in_tiers=4 if dice.random() < 0.3 else 0,
    )


def both(seed: int) -> tuple[RouteRequest, ClusterView, ClusterView]:
    """A request, and one cluster as a board shows it and without what a board knows."""
    dice = random.Random(seed)
    prefillers, decoders = (
        some(role, dice.choice((MANY, MANY + 1, 150)), dice) for role in (Role.PREFILLER, Role.DECODER)
    )
    request = RouteRequest(
        500,
        64,
        turn=dice.randrange(1000),
        hits={KIND: hits_on([*prefillers, *decoders], dice)} if dice.random() < 0.7 else {},
        exclude=frozenset([dice.choice(decoders).id]) if dice.random() < 0.2 else frozenset(),
        session="s" if dice.random() < 0.2 else "",
        now=5.0,
    )
    return request, ClusterView(views(prefillers), views(decoders)), ClusterView(tuple(prefillers), tuple(decoders))


def least(ranking: Ranking) -> float:
    assert ranking.chosen is not None
    return ranking.totals[ranking.chosen]


@pytest.mark.parametrize("name", BY_LOAD)
@settings(max_examples=150)
@given(st.integers(0, 10**9))
def test_a_few_are_compared_and_none_of_the_others_is_better(name: RoutingPolicy, seed: int) -> None:
    request, board, plain = both(seed)
    policy = make_policy(name)
    few, all_ = policy.choose(request, board), policy.choose(request, plain)
    rankings = [(few.decoders, all_.decoders)]
    if few.prefillers is not None and all_.prefillers is not None:
        rankings.append((few.prefillers, all_.prefillers))
    for one, other in rankings:
        assert least(one) == least(other) and list(one.usable) == list(other.nodes)
        if one.role is Role.DECODER:  # a prefiller's rest of work is told by time alone
            assert sorted(one.totals)[:MAX_EXPLAINED] == sorted(other.totals)[:MAX_EXPLAINED]


def test_of_many_that_are_equal_the_next_in_turn_is_taken() -> None:
    nodes = views([NodeView(f"d{number}", Role.DECODER, KIND, CHUNK, 4096) for number in range(200)])
    policy = make_policy(RoutingPolicy.LEAST_LOADED)
    request = lambda turn: RouteRequest(5, 64, turn=turn)  # noqa: E731
    assert len(shortlist(request(7), nodes)) == FEW
    taken = [policy.choose(request(turn), ClusterView((), nodes)).route for turn in range(400)]
    assert set(Counter(route.decoder for route in taken if route is not None).values()) == {2}


def test_a_prefiller_that_other_routers_have_done_with_is_idle() -> None:
    done, busy = ToldWork(at=1.0), ToldWork(0, 50.0, 1.0)
    nodes = [NodeView(f"p{n}", Role.PREFILLER, KIND, CHUNK, 4096, told=done if n else busy) for n in range(200)]
    found = shortlist(RouteRequest(5, 64), views(nodes))
    assert len(found) == FEW and "p0" not in {node.id for node in found}


def test_a_holder_is_compared_however_busy_it_is() -> None:
    nodes = views([NodeView(f"d{number}", Role.DECODER, KIND, CHUNK, 4096, number) for number in range(200)])
    request = RouteRequest(5000, 64, hits={KIND: PrefixHits(9, {"d199": 9, "gone": 3})})
    assert [node.id for node in shortlist(request, nodes)][-1] == "d199"


def test_whoever_holds_the_prompts_documents_is_among_the_few() -> None:
    nodes = views([NodeView(f"d{n}", Role.DECODER, KIND, CHUNK, 4096, takes_documents=True) for n in range(200)])
    request = RouteRequest(1000, 64, documents={KIND: DocumentHits(0, 960, 960, {"d150": 960.0})})
    for turn in (0, 40):
        chosen = make_policy(RoutingPolicy.PREFIX_AWARE).choose(replace(request, turn=turn), ClusterView((), nodes))
        assert chosen.decoders.node is not None and chosen.decoders.node.id == "d150"


def test_of_prefillers_that_decode_in_need_those_are_compared_that_decode_least() -> None:
    one = lambda n: NodeView(f"p{n}", Role.PREFILLER, KIND, CHUNK, 4096, sequences=0 if n == 150 else 3)  # noqa: E731
    nodes = views([one(number) for number in range(200)])
    chosen = make_policy(RoutingPolicy.LEAST_LOADED).choose(RouteRequest(5, 64), ClusterView(nodes, ()))
    assert chosen.route is not None and chosen.route.decoder == "p150"
