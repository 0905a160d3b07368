"""Which prefiller and which decoder, chosen together. Pure: a request and a frozen view in, a route out.

Owns the cost model; knows no clock, no socket. Nodes whose KV is not interchangeable are never paired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcore.chunk_keys import usable_chunks
from kvcore.config.schema import RoutingPolicy
from kvcore.types import Role, Route
from router.routing.index import PrefixHits

SEQUENCE_COST_TOKENS = 64
"""One more running sequence on a decoder weighs as much as this many tokens to bring over."""
REMOTE_TOKEN_COST = 0.25
"""A cached token on another node costs this share of computing it (loading measured at 4 to 10 times faster)."""
NO_HITS = PrefixHits()


@dataclass(frozen=True, slots=True)
class NodeView:
    """What a policy sees of a node that may be used now. `sequences` and `prefill_tokens` are outstanding work."""

    id: str
    role: Role
    fingerprint: bytes
    chunk_tokens: int
    max_context: int
    sequences: int = 0
    prefill_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The usable nodes at one moment, in a stable order."""

    prefillers: tuple[NodeView, ...] = ()
    decoders: tuple[NodeView, ...] = ()


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a choice depends on. `hits[fingerprint]`: where the prompt's chunks are. `turn` counts requests: it breaks
    ties and is round robin's memory. `decoder`: already chosen, only a prefiller is wanted."""

    prompt_tokens: int
    min_prefill_tokens: int
    completion_tokens: int = 1
    turn: int = 0
    hits: Mapping[bytes, PrefixHits] = field(default_factory=dict)
    exclude: frozenset[str] = frozenset()
    decoder: str | None = None


class RoutePolicy(Protocol):
    """How a route is chosen."""

    def choose(self, request: RouteRequest, view: ClusterView) -> Route | None:
        """None: no decoder can take it. A route without prefiller: the decoder computes all that is not cached."""
        ...


class PrefixAware:
    """Cheapest first: outstanding work plus what would have to be brought over from other nodes."""

    def choose(self, request: RouteRequest, view: ClusterView) -> Route | None:
        """See RoutePolicy."""

        def decoder_cost(node: NodeView) -> float:
            return node.sequences * SEQUENCE_COST_TOKENS + _remote_cost(request, node)

        def prefiller_cost(node: NodeView) -> float:
            return node.prefill_tokens + _remote_cost(request, node)

        return _route(request, view, decoder_cost, prefiller_cost)


class RoundRobin:
    """Each in turn, whatever is cached where."""

    def choose(self, request: RouteRequest, view: ClusterView) -> Route | None:
        """See RoutePolicy."""
        return _route(request, view, lambda node: 0.0, lambda node: 0.0)


def make_policy(kind: RoutingPolicy) -> RoutePolicy:
    """The configured one."""
    return RoundRobin() if kind is RoutingPolicy.ROUND_ROBIN else PrefixAware()


def _remote_cost(request: RouteRequest, node: NodeView) -> float:
    hits = request.hits.get(node.fingerprint, NO_HITS)
    return (hits.longest - hits.by_node.get(node.id, 0)) * node.chunk_tokens * REMOTE_TOKEN_COST


def _route(
    request: RouteRequest,
    view: ClusterView,
    decoder_cost: Callable[[NodeView], float],
    prefiller_cost: Callable[[NodeView], float],
) -> Route | None:
    decoder = _cheapest(
        [
            node
            for node in view.decoders
            if node.max_context >= request.prompt_tokens + request.completion_tokens
            and (node.id == request.decoder if request.decoder else node.id not in request.exclude)
        ],
        decoder_cost,
        request.turn,
    )
    if decoder is None:
        return None
    longest = request.hits.get(decoder.fingerprint, NO_HITS).longest
    full_chunks = usable_chunks(request.prompt_tokens, decoder.chunk_tokens)
    cached = min(longest, full_chunks) * decoder.chunk_tokens
    prefiller = None
    if full_chunks * decoder.chunk_tokens <= cached:
        reason = "all_chunks_cached" if full_chunks else "no_full_chunk"
    elif request.prompt_tokens - cached < request.min_prefill_tokens:
        reason = "short_rest"
    else:
        prefiller = _cheapest(
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
        reason = ("prefix_hit" if cached else "no_prefix") if prefiller else "no_prefiller"
    return Route(
        prefiller=prefiller.id if prefiller else None,
        decoder=decoder.id,
        expected_cached_tokens=cached,
        reason=reason,
    )


def _cheapest(nodes: Sequence[NodeView], cost: Callable[[NodeView], float], turn: int) -> NodeView | None:
    if not nodes:
        return None
    costs = [cost(node) for node in nodes]
    least = min(costs)
    best = [node for node, its in zip(nodes, costs, strict=True) if its == least]
    return best[turn % len(best)]
