"""Which prefiller and which decoder, chosen together. Pure: a request and a frozen view in, a Decision out.

A policy is a row of filters, of weighted scorers and a picker for each role (docs/how-to/policy.md); each of them looks
at all nodes at once, as a call a node would cost more than what it computes. Owns what holds under every policy: whom
a request can never use, and when it needs no prefiller. Knows no clock, no socket.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import add
from typing import Protocol

from kvcore.chunk_keys import usable_chunks
from kvcore.config.routing import RoutingPolicy
from kvcore.kv_parts import describe_difference, differing_parts
from kvcore.types import Role, Route
from router.routing.costs import WayChoice, choose_way, other_ways, ways
from router.routing.decision import Cut, Decision, Ranking
from router.routing.promotion import expected, with_rates
from router.routing.shortlist import shortlist
from router.routing.views import ClusterView, NodeKind, NodeView, NodeViews, RouteRequest, serves

IN_NEED = "in_need"
"""`Route.reason` where a prefiller decodes, as no decoder can."""
STAYS = "moving_costs_more"
"""`Route.reason` where the decoder computes, as a prefiller would move more than it saves (`router.routing.costs`)."""
TRIES = "tried_again"
"""`Route.reason` where a way is taken against what was measured, as that is doubted."""


class RoutePolicy(Protocol):
    """How a route is chosen."""

    def choose(self, request: RouteRequest, view: ClusterView) -> Decision:
        """Without route: no node can take it. A route without prefiller: the decoder computes all that is not cached.
        Where no decoder can take it, a prefiller is the route's decoder, for IN_NEED."""
        ...


@dataclass(frozen=True, slots=True)
class Filter:
    """Leaves nodes out. `keep(request, nodes, decoder)`: those that stay, in their order. `reason`: why the others do
    not, in a few words for people, and `detail(node, decoder)` more of them. `decoder`: the one that was chosen, when a
    prefiller for it is wanted."""

    reason: str
    keep: Callable[[RouteRequest, Sequence[NodeView], NodeView | None], Sequence[NodeView]]
    detail: Callable[[NodeView, NodeView | None], str] | None = None
    always: bool = True
    """False: all stay for a request that `is_plain`."""


@dataclass(frozen=True, slots=True)
class KindFilter:
    """A Filter by what many nodes have in common: with a thousand of one kind it looks at one. `wanted(request, node,
    decoder)`: whether such nodes stay."""

    reason: str
    wanted: Callable[[RouteRequest, NodeView | NodeKind, NodeView | None], bool]
    detail: Callable[[NodeView, NodeView | None], str] | None = None
    always: bool = True

    def keep(self, request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[NodeView]:
        """As of a Filter."""
        wanted = self.wanted
        for node in nodes.kinds if isinstance(nodes, NodeViews) else nodes:
            if not wanted(request, node, decoder):
                return [node for node in nodes if wanted(request, node, decoder)]
        return nodes


@dataclass(frozen=True, slots=True)
class Scorer:
    """A number for each node: `score(request, nodes, decoder)`, in their order; the lower the better. `decoder`: as for
    a Filter."""

    name: str
    score: Callable[[RouteRequest, Sequence[NodeView], NodeView | None], Sequence[float]]


def cheapest(totals: Sequence[float], turn: int) -> int:
    """The place of the least total; of several equal ones the next in turn."""
    least = min(totals)
    count = totals.count(least)
    nth = turn % count
    place = totals.index(least, nth)  # so many come before it at most
    for _ in range(nth - totals[:nth].count(least)):
        place = totals.index(least, place + 1)
    return place


@lru_cache(maxsize=256)
def no_scores(count: int) -> Sequence[float]:
    """Of a scorer that prefers none of so many nodes. The same object each time: nobody need look at a thousand."""
    return (0.0,) * count


@dataclass(frozen=True, slots=True)
class Rules:
    """How a node of one role is chosen.

    `filters` are preferences: one that would leave nobody is passed over. `scorers`: with the weight of each; the
    weighted sum is a node's total. `pick(totals, turn)`: the place of the chosen one among one total or more.
    `by_load`: the scorers ask of a node only its load and what it has of the prompt (`router.routing.shortlist`).
    """

    scorers: tuple[tuple[Scorer, float], ...] = ()
    filters: tuple[Filter | KindFilter, ...] = ()
    pick: Callable[[Sequence[float], int], int] = cheapest
    by_load: bool = False
    names: tuple[str, ...] = field(init=False)
    """Of the scorers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple([scorer.name for scorer, _ in self.scorers]))


@dataclass(frozen=True, slots=True)
class Policy:
    """A RoutePolicy made of rules: the decoder is chosen first, then a prefiller for it. Where no decoder is left, a
    prefiller does both, chosen by the decoder's rules."""

    decoder: Rules
    prefiller: Rules

    def choose(self, request: RouteRequest, view: ClusterView) -> Decision:
        """See RoutePolicy."""
        request = with_rates(request, view)
        decoders = _rank(Role.DECODER, DECODER_FILTERS, self.decoder, request, view.decoders, decoder=None)
        decoder = decoders.node
        if decoder is None:
            return self._choose_in_need(request, view, decoders)
        prefillers, prefiller, cached_there = None, None, 0
        cached, reason = _prefiller_unneeded(request, decoder)
        if reason is None:
            rules = self.prefiller
            prefillers = _rank(Role.PREFILLER, PREFILLER_FILTERS, rules, request, view.prefillers, decoder=decoder)
            if (prefiller := prefillers.node) is None:
                reason = _why_no_prefiller(prefillers.cuts, decoder)
            else:
                cached_there = _cached_tokens(request, prefiller)
                reason = "prefix_hit" if cached_there else "no_prefix"
        compared = ways(request, decoder, prefiller)
        way = choose_way(request, compared, decoder, prefiller) if request.decoder is None else WayChoice()
        if way.stays:
            prefiller, reason = None, STAYS
        if way.tries:
            reason = TRIES
        route = Route(
            prefiller=prefiller.id if prefiller else None,
            decoder=decoder.id,
            expected_cached_tokens=cached if prefiller is None else cached_there,
            reason=reason,
            expected_promoted_tokens=expected(request, prefiller or decoder).chunks * decoder.chunk_tokens,
        )
        others = other_ways(request, decoder, prefillers.node if prefillers else None)
        return Decision(route, decoders, prefillers, view.unusable, compared, way, others)

    def _choose_in_need(self, request: RouteRequest, view: ClusterView, decoders: Ranking) -> Decision:
        """A prefiller decodes, and computes the prompt too: there is nobody to hand anything over to. Decoders that are
        there and full are no need: prefillers would only fill up as well."""
        candidates = () if any(node.id in request.full for node in view.decoders) else view.prefillers
        rules = replace(self.decoder, by_load=False)  # they stand in the order of what they prefill, not decode
        stand_ins = _rank(Role.PREFILLER, DECODER_FILTERS, rules, request, candidates, decoder=None)
        route, node = None, stand_ins.node
        if node is not None:
            route = Route(
                prefiller=None,
                decoder=node.id,
                expected_cached_tokens=_prefiller_unneeded(request, node)[0],
                reason=IN_NEED,
                expected_promoted_tokens=expected(request, node).chunks * node.chunk_tokens,
            )
        return Decision(route, decoders, stand_ins, view.unusable)


def make_policy(name: RoutingPolicy) -> RoutePolicy:
    """The configured one: `make()` of the module of this name in `router.routing.policies`."""
    policy: RoutePolicy = importlib.import_module(f"router.routing.policies.{name.value}").make()
    return policy


# --- what holds under every policy -----------------------------------------------------------------------------------


def _decoders_that_fit(request: RouteRequest, node: NodeView | NodeKind, _: NodeView | None) -> bool:
    return node.max_context >= request.prompt_tokens + request.completion_tokens


def _obeys(request: RouteRequest, node: NodeView | NodeKind, _: NodeView | None) -> bool:
    return not request.asks or request.asks.isdisjoint(node.lacks)


def _serves_the_adapter(request: RouteRequest, node: NodeView | NodeKind, _: NodeView | None) -> bool:
    return not request.adapter or serves(node, request.adapter)


def _prefiller_fits(request: RouteRequest, node: NodeView | NodeKind, _: NodeView | None) -> bool:
    return node.max_context >= request.prompt_tokens


def _not_excluded(request: RouteRequest, nodes: Sequence[NodeView], _: NodeView | None) -> Sequence[NodeView]:
    exclude = request.exclude
    return [node for node in nodes if node.id not in exclude] if exclude else nodes


def _decoders_wanted(request: RouteRequest, nodes: Sequence[NodeView], _: NodeView | None) -> Sequence[NodeView]:
    if request.decoder:
        return [node for node in nodes if node.id == request.decoder]
    return _not_excluded(request, nodes, None)


def _of_the_answers_model(request: RouteRequest, node: NodeView | NodeKind, _: NodeView | None) -> bool:
    return not request.fingerprint or node.fingerprint == request.fingerprint


def _of_the_decoders_kv(request: RouteRequest, node: NodeView | NodeKind, decoder: NodeView | None) -> bool:
    assert decoder is not None, "the decoder is chosen first"
    return node.fingerprint == decoder.fingerprint


def _what_differs(node: NodeView, decoder: NodeView | None) -> str:
    if decoder is None or decoder.kv_spec is None or node.kv_spec is None:
        return ""
    return describe_difference(node.kv_spec, decoder.kv_spec)


def _why_no_prefiller(cuts: Sequence[Cut], decoder: NodeView) -> str:
    """There is none, or none whose KV the decoder reads: then with the names of what differs at the first."""
    if not cuts or cuts[0].reason != _OTHER_KV.reason or cuts[0].kept:
        return "no_prefiller"
    theirs, wanted = cuts[0].before[0].kv_spec, decoder.kv_spec
    names = ", ".join(differing_parts(theirs, wanted)) if theirs is not None and wanted is not None else ""
    return "other_kv" + (f": {names}" if names else "")


def _without_doubt(request: RouteRequest, node: NodeView | NodeKind, _: NodeView | None) -> bool:
    return not node.doubtful


def _takes_documents(request: RouteRequest, node: NodeView | NodeKind, _: NodeView | None) -> bool:
    return not request.documents or node.takes_documents


_PREFERRED = (
    KindFilter("slow or silent a moment ago", _without_doubt),
    KindFilter("takes no documents", _takes_documents, always=False),
)
"""Preferences, as those of a policy: one that would leave nobody is passed over."""
_OTHER_KV = KindFilter("its KV is not what the decoder reads", _of_the_decoders_kv, _what_differs)
_NO_ADAPTER = KindFilter("does not serve the adapter, or has other files of it", _serves_the_adapter, always=False)
DECODER_FILTERS = (
    _NO_ADAPTER,
    KindFilter("cannot do what the request asks", _obeys, always=False),
    KindFilter("too short a context", _decoders_that_fit),
    Filter("tried before, or another one was wanted", _decoders_wanted, always=False),
    KindFilter("other weights or settings than the answer began with", _of_the_answers_model, always=False),
)
PREFILLER_FILTERS = (
    _NO_ADAPTER,
    _OTHER_KV,
    KindFilter("too short a context", _prefiller_fits),
    Filter("tried before", _not_excluded, always=False),
)


def _prefiller_unneeded(request: RouteRequest, decoder: NodeView) -> tuple[int, str | None]:
    """(Prompt tokens cached somewhere, why the decoder computes the rest itself; None: it needs a prefiller.)"""
    if request.whole_prompt:
        return 0, "prompt_logprobs"
    if request.documents:
        return _prefiller_of_documents_unneeded(request, decoder)
    chunk_tokens = decoder.chunk_tokens
    full_chunks = usable_chunks(request.prompt_tokens, chunk_tokens)
    cached = _cached_tokens(request, decoder)
    if full_chunks * chunk_tokens <= cached:
        return cached, "all_chunks_cached" if full_chunks else "no_full_chunk"
    return cached, "short_rest" if request.prompt_tokens - cached < request.min_prefill_tokens else None


def _prefiller_of_documents_unneeded(request: RouteRequest, decoder: NodeView) -> tuple[int, str | None]:
    """As above. A prefiller computes documents and what they are behind; all the rest is the decoder's in any case."""
    cached = _cached_tokens(request, decoder)
    if decoder.takes_documents:
        left = request.documents_for(decoder).left(_cached_prefix(request, decoder))
    else:
        left = request.prompt_tokens - cached
    if left <= 0:
        return cached, "all_chunks_cached"
    return cached, "short_rest" if left < request.min_prefill_tokens else None


def _cached_tokens(request: RouteRequest, node: NodeView) -> int:
    """Of the prompt, what this node would not have to compute."""
    if not (request.hits or request.documents):
        return 0
    return _cached_prefix(request, node) + request.documents_for(node).in_reach


def _cached_prefix(request: RouteRequest, node: NodeView) -> int:
    usable = usable_chunks(request.prompt_tokens, node.chunk_tokens)
    in_memory = min(request.hits_for(node).in_reach_of(node.id), usable)
    return (in_memory + expected(request, node).chunks) * node.chunk_tokens


def _rank(
    role: Role,
    required: tuple[Filter | KindFilter, ...],
    rules: Rules,
    request: RouteRequest,
    nodes: Sequence[NodeView],
    *,
    decoder: NodeView | None,
) -> Ranking:
    """Filter, score and pick the nodes of one role."""
    cuts: tuple[Cut, ...] = ()
    plain = request.is_plain
    for must, filters in ((True, required), (False, (*_PREFERRED, *rules.filters))):
        for rule in filters:
            if plain and not rule.always:
                continue
            kept = rule.keep(request, nodes, decoder)
            if kept is not nodes and len(kept) != len(nodes) and (must or kept):
                cuts += (_cut(rule, nodes, kept, decoder),)
                nodes = kept
    if not nodes:
        return Ranking(role, (), (), rules.names, ((),) * len(rules.names), cuts, None, ())
    usable = nodes
    if rules.by_load:
        nodes = shortlist(request, usable)
    totals = zeros = no_scores(len(nodes))
    columns = []
    for scorer, weight in rules.scorers:
        column = scorer.score(request, nodes, decoder)
        if column is not zeros:
            if weight != 1.0:
                column = [weight * score for score in column]
            totals = column if totals is zeros else list(map(add, totals, column))
        columns.append(column)
    place = rules.pick(totals, request.turn)
    return Ranking(role, nodes, totals, rules.names, tuple(columns), cuts, place, usable)


def _cut(
    rule: Filter | KindFilter, before: Sequence[NodeView], kept: Sequence[NodeView], decoder: NodeView | None
) -> Cut:
    detail = rule.detail
    return Cut(rule.reason, before, kept, None if detail is None else lambda node: detail(node, decoder))
