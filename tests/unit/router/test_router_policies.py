"""What is particular to each policy."""

import pytest

from kvcore.types import Role
from router.routing.index import PrefixHits
from router.routing.policies import consistent_hash, least_loaded, power_of_two, prefix_aware
from router.routing.policies.power_of_two import better_of_two
from router.routing.policy import RoutePolicy
from router.routing.views import ClusterView, NodeView, RouteRequest


def view(decoders: list[int], prefillers: list[int] | None = None) -> ClusterView:
    """Nodes by their load: sequences of d0, d1, ..., tokens of p0, p1, ..."""
    return ClusterView(
        tuple(NodeView(f"p{i}", Role.PREFILLER, b"kv", 16, 4096, 0, load) for i, load in enumerate(prefillers or [])),
        tuple(NodeView(f"d{i}", Role.DECODER, b"kv", 16, 4096, load) for i, load in enumerate(decoders)),
    )


def chosen(policy: RoutePolicy, request: RouteRequest, nodes: ClusterView) -> tuple[str | None, str]:
    route = policy.choose(request, nodes).route
    assert route is not None
    return route.prefiller, route.decoder


def test_the_least_loaded_is_taken_though_another_one_holds_the_prompt() -> None:
    request = RouteRequest(500, 64, hits={b"kv": PrefixHits(10, {"d0": 10, "p0": 10})})
    assert chosen(least_loaded.make(), request, view([3, 2], [9000, 200])) == ("p1", "d1")


def test_of_two_drawn_by_lot_the_less_loaded_is_taken() -> None:
    loads = [5.0, 1.0, 4.0, 2.0, 3.0]
    taken = [better_of_two(loads, turn) for turn in range(2000)]
    shares = [taken.count(place) / len(taken) for place in range(5)]
    # Of the ten pairs the least loaded is in four, the next in three where it wins, and the most loaded wins in none.
    assert shares == pytest.approx([0.0, 0.4, 0.1, 0.3, 0.2], abs=0.05)
    assert better_of_two([7.0], 3) == 0


def test_many_routers_that_see_the_same_do_not_all_take_the_same_node() -> None:
    nodes = view([0] + [1] * 31)
    request = [RouteRequest(10, 64, turn=turn) for turn in range(320)]
    by_lot = [chosen(power_of_two.make(), one, nodes)[1] for one in request]
    least = [chosen(least_loaded.make(), one, nodes)[1] for one in request]
    assert least.count("d0") == 320 and by_lot.count("d0") < 50


def test_a_session_stays_on_its_nodes_and_a_node_that_goes_moves_only_its_own() -> None:
    nodes, policy = view([0] * 8, [0] * 8), consistent_hash.make()

    def home(number: int, of: ClusterView) -> str:
        request = RouteRequest(500, 64, turn=number, prompt_token_ids=[number] * 500, session=f"s{number}")
        return chosen(policy, request, of)[1]

    homes = [home(number, nodes) for number in range(200)]
    assert homes == [home(number, nodes) for number in range(200)]
    assert min(homes.count(f"d{i}") for i in range(8)) > 10
    without = ClusterView(nodes.prefillers, nodes.decoders[1:])
    moved = [number for number in range(200) if home(number, without) != homes[number]]
    assert moved == [number for number in range(200) if homes[number] == "d0"]


def test_one_beginning_goes_to_one_node_where_no_session_is_named() -> None:
    nodes, policy = view([0] * 8), consistent_hash.make()
    system = list(range(256))
    requests = [RouteRequest(300, 64, prompt_token_ids=system + [turn] * 44, turn=turn) for turn in range(20)]
    assert len({chosen(policy, request, nodes) for request in requests}) == 1


def test_a_session_leaves_a_node_that_is_much_fuller_than_the_others() -> None:
    policy, request = consistent_hash.make(), RouteRequest(10, 64, session="s")
    home = chosen(policy, request, view([10] * 4))[1]
    loads = [10] * 4
    loads[int(home[1])] = 20
    assert chosen(policy, request, view(loads))[1] != home


def test_a_plain_servers_own_cache_counts_and_that_of_others_does_not() -> None:
    """Else a decoder would be asked to go on from KV that it cannot read."""
    own = {b"kv": PrefixHits(448, {"d1": 448, "p0": 320}, each_its_own=True)}
    nodes = ClusterView(
        tuple(NodeView(f"p{i}", Role.PREFILLER, b"kv", 1, 4096) for i in range(2)),
        tuple(NodeView(f"d{i}", Role.DECODER, b"kv", 1, 4096) for i in range(2)),
    )
    policy = prefix_aware.make()
    found = policy.choose(RouteRequest(500, 64, hits=own), nodes).route
    assert found is not None
    assert (found.prefiller, found.decoder, found.expected_cached_tokens) == (None, "d1", 448)
    assert found.reason == "short_rest"
    other = policy.choose(RouteRequest(500, 64, hits=own, exclude=frozenset({"d1"})), nodes).route
    assert other is not None
    assert (other.prefiller, other.decoder, other.expected_cached_tokens) == ("p0", "d0", 320), "what p0 has"


def test_of_equal_nodes_a_session_has_its_own_and_no_load_is_borne_for_it() -> None:
    policy, nodes = prefix_aware.make(), view([0] * 8)
    taken = {
        name: {chosen(policy, RouteRequest(10, 64, turn=turn, session=name), nodes)[1] for turn in range(8)}
        for name in ("a", "b", "c", "d", "e")
    }
    assert all(len(one) == 1 for one in taken.values()) and len(set.union(*taken.values())) > 1
    own = int(min(taken["a"])[1:])
    loads = [int(place == own) for place in range(8)]
    assert chosen(policy, RouteRequest(10, 64, session="a"), view(loads))[1] != f"d{own}"
    assert {chosen(policy, RouteRequest(10, 64, turn=turn), nodes)[1] for turn in range(8)} == {
        f"d{place}" for place in range(8)
    }
