"""The policies made of filters and scorers choose what the plain functions chose that they replaced."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.machines import more_examples

from kvcore.chunk_keys import usable_chunks
from kvcore.config.routing import RoutingPolicy
from kvcore.types import Role, Route
from router.routing.index import PrefixHits
from router.routing.policy import IN_NEED, make_policy
from router.routing.views import NO_HITS, ClusterView, NodeView, RouteRequest


def reference(name: RoutingPolicy, request: RouteRequest, view: ClusterView) -> Route | None:
    """One function a policy, as it was before."""

    def remote(node: NodeView) -> float:
        hits = request.hits.get(node.fingerprint, NO_HITS)
        return (hits.longest - hits.by_node.get(node.id, 0)) * node.chunk_tokens * 0.25

    if name is RoutingPolicy.ROUND_ROBIN:
        return reference_route(request, view, lambda node: 0.0, lambda node: 0.0)
    return reference_route(
        request,
        view,
        lambda node: node.sequences * 64 + remote(node),
        lambda node: node.prefill_tokens + remote(node),
    )


def reference_route(
    request: RouteRequest,
    view: ClusterView,
    decoder_cost: Callable[[NodeView], float],
    prefiller_cost: Callable[[NodeView], float],
) -> Route | None:
    decoder = reference_cheapest(
        [
            node
            for node in view.decoders
            if node.max_context >= request.prompt_tokens + request.completion_tokens
            and (node.id == request.decoder if request.decoder else node.id not in request.exclude)
            and request.fingerprint in (b"", node.fingerprint)
        ],
        decoder_cost,
        request.turn,
    )
    if decoder is None:
        return None  # and nobody stood in for it
    longest = request.hits.get(decoder.fingerprint, NO_HITS).longest
    full_chunks = usable_chunks(request.prompt_tokens, decoder.chunk_tokens)
    cached = min(longest, full_chunks) * decoder.chunk_tokens
    prefiller = None
    if full_chunks * decoder.chunk_tokens <= cached:
        reason = "all_chunks_cached" if full_chunks else "no_full_chunk"
    elif request.prompt_tokens - cached < request.min_prefill_tokens:
        reason = "short_rest"
    else:
        prefiller = reference_cheapest(
            [
                node
                for node in view.prefillers
                if node.fingerprint == decoder.fingerprint
                and node.max_context >= request.prompt_tokens
                and node.id not in request.exclude
            ],
            prefiller_cost,
            request.turn,
        )
        if prefiller:  # what it has is counted in its own chunks
            usable = usable_chunks(request.prompt_tokens, prefiller.chunk_tokens)
            cached = min(longest, usable) * prefiller.chunk_tokens
        foreign = view.prefillers and not any(node.fingerprint == decoder.fingerprint for node in view.prefillers)
        found = "prefix_hit" if cached else "no_prefix"
        reason = found if prefiller else "other_kv" if foreign else "no_prefiller"
    return Route(
        prefiller=prefiller.id if prefiller else None,
        decoder=decoder.id,
        expected_cached_tokens=cached,
        reason=reason,
    )


def reference_cheapest(nodes: Sequence[NodeView], cost: Callable[[NodeView], float], turn: int) -> NodeView | None:
    if not nodes:
        return None
    costs = [cost(node) for node in nodes]
    least = min(costs)
    best = [node for node, its in zip(nodes, costs, strict=True) if its == least]
    return best[turn % len(best)]


KINDS = st.sampled_from([b"f" * 16, b"g" * 16])


def nodes(role: Role) -> st.SearchStrategy[tuple[NodeView, ...]]:
    """Up to six, of few different loads so that there are ties."""
    one = st.tuples(
        KINDS,
        st.sampled_from([7, 16]),
        st.sampled_from([100, 1000]),
        st.sampled_from([0, 1, 5]),
        st.sampled_from([0, 64]),
    )
    return st.lists(one, max_size=6).map(
        lambda rows: tuple(NodeView(f"{role.value[0]}{number}", role, *row) for number, row in enumerate(rows))
    )


NAMES = st.sampled_from([f"{role}{number}" for role in "pd" for number in range(6)])


@st.composite
def hits(draw: st.DrawFn) -> PrefixHits:
    longest = draw(st.integers(0, 30))
    return PrefixHits(longest, draw(st.dictionaries(NAMES, st.integers(0, longest), max_size=6)))


requests = st.builds(
    RouteRequest,
    prompt_tokens=st.integers(1, 1100),
    min_prefill_tokens=st.sampled_from([0, 64]),
    completion_tokens=st.integers(1, 100),
    turn=st.integers(0, 100),
    hits=st.dictionaries(KINDS, hits(), max_size=2),
    exclude=st.frozensets(NAMES, max_size=4),
    decoder=st.none() | NAMES,
    fingerprint=st.just(b"") | KINDS,
)
views = st.builds(ClusterView, prefillers=nodes(Role.PREFILLER), decoders=nodes(Role.DECODER))


CHOICES = given(request=requests, view=views)
NAMED = pytest.mark.parametrize("name", [RoutingPolicy.PREFIX_AWARE, RoutingPolicy.ROUND_ROBIN])


@NAMED
@settings(max_examples=100, deadline=None)
@CHOICES
def test_the_route_is_the_one_that_was_chosen_before(
    name: RoutingPolicy, request: RouteRequest, view: ClusterView
) -> None:
    chosen = make_policy(name).choose(request, view).route
    before = reference(name, request, view)
    if before is None and chosen is not None:
        assert chosen.reason == IN_NEED
        as_decoders = ClusterView(decoders=view.prefillers)  # who stands in is chosen as a decoder is
        before = reference(name, request, as_decoders)
        assert before is not None
        before = replace(before, prefiller=None, reason=IN_NEED)
    assert chosen == before


test_more_routes = NAMED(more_examples(test_the_route_is_the_one_that_was_chosen_before, CHOICES, max_examples=300))
