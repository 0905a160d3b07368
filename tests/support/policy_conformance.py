"""What every routing policy must do. Each check takes a policy; one that passes all may serve requests."""

import random
from collections.abc import Callable, Iterator

from kvcore.types import Role, Route
from router.routing.index import PrefixHits
from router.routing.policy import IN_NEED, RoutePolicy
from router.routing.views import ClusterView, LeftOut, NodeView, RouteRequest

KINDS = (b"f" * 16, b"g" * 16)


def clusters(count: int = 300) -> Iterator[tuple[RouteRequest, ClusterView]]:
    """Requests and clusters of all sorts, the same at each call: no node, one, many; short contexts, mixed KV, load."""
    dice = random.Random(1)

    def nodes(role: Role) -> tuple[NodeView, ...]:
        return tuple(
            NodeView(
                id=f"{role}{number}",
                role=role,
                fingerprint=dice.choice(KINDS[: dice.choice((1, 1, 2))]),
                chunk_tokens=16,
                max_context=dice.choice((256, 4096, 4096)),
                sequences=dice.choice((0, dice.randrange(300))),
                prefill_tokens=dice.choice((0, dice.randrange(100_000))),
            )
            for number in range(dice.choice((0, 1, 2, 3, 40)))
        )

    for turn in range(count):
        view = ClusterView(nodes(Role.PREFILLER), nodes(Role.DECODER), (LeftOut("gone", Role.DECODER, "draining"),))
        known = [node.id for node in (*view.prefillers, *view.decoders)]
        longest = dice.randrange(20)
        hits = PrefixHits(longest, {name: dice.randrange(longest + 1) for name in known if dice.random() < 0.5})
        yield (
            RouteRequest(
                prompt_tokens=dice.choice((1, 16, 17, 100, 500, 4000)),
                min_prefill_tokens=dice.choice((0, 64)),
                completion_tokens=dice.choice((1, 100)),
                turn=turn,
                hits={kind: hits for kind in KINDS if dice.random() < 0.7},
                exclude=(exclude := frozenset(name for name in known if dice.random() < 0.1)),
                full=exclude if dice.random() < 0.2 else frozenset(),
                decoder=dice.choice((None, None, "decoder0")),
            ),
            view,
        )


def decoder_of(route: Route, view: ClusterView) -> NodeView:
    """The node that decodes."""
    (decoder,) = [node for node in (*view.decoders, *view.prefillers) if node.id == route.decoder]
    return decoder


def fits(request: RouteRequest, node: NodeView) -> bool:
    wanted = node.id == request.decoder if request.decoder else node.id not in request.exclude
    return wanted and node.max_context >= request.prompt_tokens + request.completion_tokens


def takes_only_nodes_that_can_serve(policy: RoutePolicy) -> None:
    """A decoder that holds prompt and completion, a prefiller of the same KV that holds the prompt, none excluded."""
    for request, view in clusters():
        if (route := policy.choose(request, view).route) is None:
            continue
        decoder = decoder_of(route, view)
        assert fits(request, decoder)
        if route.prefiller is not None:
            (prefiller,) = [node for node in view.prefillers if node.id == route.prefiller]
            assert prefiller.fingerprint == decoder.fingerprint
            assert prefiller.max_context >= request.prompt_tokens and prefiller.id not in request.exclude


def serves_whatever_can_be_served(policy: RoutePolicy) -> None:
    """A decoder where one fits; else, unless decoders are there and full, a prefiller decodes. Whether a request should
    wait is not a policy's question."""
    stood_in = 0
    for request, view in clusters():
        decision = policy.choose(request, view)
        decoders = [node.id for node in view.decoders if fits(request, node)]
        full = any(node.id in request.full for node in view.decoders)
        prefillers = [] if full else [node.id for node in view.prefillers if fits(request, node)]
        if decision.route is None:
            assert not (decoders or prefillers)
            assert "gone: draining" in decision.why_no_decoder()
        elif decoders:
            assert decision.route.decoder in decoders and decision.route.reason != IN_NEED
        else:
            assert decision.route.decoder in prefillers
            assert (decision.route.prefiller, decision.route.reason) == (None, IN_NEED), "it computes the prompt too"
            stood_in += 1
    assert stood_in, "such clusters are among them"


def expects_of_the_cache_what_the_index_says(policy: RoutePolicy) -> None:
    """Whole chunks of the prompt, at least one token left over; a prefiller only if there is something to compute."""
    for request, view in clusters():
        if (route := policy.choose(request, view).route) is None:
            continue
        decoder = decoder_of(route, view)
        longest = request.hits_for(decoder).longest * decoder.chunk_tokens
        usable = (request.prompt_tokens - 1) // decoder.chunk_tokens * decoder.chunk_tokens
        assert route.expected_cached_tokens == min(longest, usable)
        if route.expected_cached_tokens == usable:
            assert route.prefiller is None


def explains_itself(policy: RoutePolicy) -> None:
    """The chosen one comes first among the candidates; each candidate's scores make its total; everyone is either a
    candidate or left out for a reason."""
    for request, view in clusters():
        decision = policy.choose(request, view)
        candidates, left_out = decision.candidates(limit=1000), decision.left_out(limit=1000)
        assert all(abs(sum(item.scores.values()) - item.total) < 1e-6 for item in candidates)
        assert all(item.reason for item in left_out)
        told = [item.node for item in candidates] + [item.node for item in left_out]
        assert len(told) == len(set(told)), "told once"
        assert {node.id for node in view.decoders} | {"gone"} <= set(told)
        if decision.route is None:
            continue
        decoding = Role.PREFILLER if decision.route.reason == IN_NEED else Role.DECODER
        chosen = next(item.node for item in candidates if item.role is decoding)
        assert chosen == decision.route.decoder
        if decision.route.prefiller is not None:
            prefillers = [item.node for item in candidates if item.role is Role.PREFILLER]
            assert prefillers[0] == decision.route.prefiller
            assert {node.id for node in view.prefillers} <= set(told)


def decides_by_what_it_is_given_alone(policy: RoutePolicy) -> None:
    """The same request and view give the same choice: no clock and no dice."""
    for request, view in clusters(50):
        assert policy.choose(request, view).route == policy.choose(request, view).route


def spreads_requests_over_equal_nodes(policy: RoutePolicy) -> None:
    """Over the turns, with prompts that share nothing, each of several nodes that are alike gets its share."""
    decoders = tuple(NodeView(f"d{i}", Role.DECODER, KINDS[0], 16, 4096) for i in range(4))
    prefillers = tuple(NodeView(f"p{i}", Role.PREFILLER, KINDS[0], 16, 4096) for i in range(4))
    routes = [
        policy.choose(
            RouteRequest(500, 64, turn=turn, prompt_token_ids=[turn] * 500), ClusterView(prefillers, decoders)
        ).route
        for turn in range(400)
    ]
    for nodes in (decoders, prefillers):
        taken = [route.decoder if nodes is decoders else route.prefiller for route in routes if route is not None]
        shares = [taken.count(node.id) for node in nodes]
        assert min(shares) >= 50, shares


CHECKS: tuple[Callable[[RoutePolicy], None], ...] = (
    takes_only_nodes_that_can_serve,
    serves_whatever_can_be_served,
    expects_of_the_cache_what_the_index_says,
    explains_itself,
    decides_by_what_it_is_given_alone,
    spreads_requests_over_equal_nodes,
)
