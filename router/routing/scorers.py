"""What nodes are scored by: outstanding work, and what would have to be brought over. Pure; the lower the better."""

from collections.abc import Sequence

import xxhash

from kvcore.chunk_keys import usable_chunks
from router.routing.limits import RateLimits
from router.routing.policy import Scorer, no_scores
from router.routing.promotion import promoting_tokens
from router.routing.views import NodeView, RouteRequest

COMPUTE_OVER_LOAD = 16.0
"""A token that must be computed for one that is brought over. Computing takes 4 to 10 times as long; and whoever
computes again what another node has keeps its queue waiting, and pushes out of its cache what others come back for.
Of 4, 6, 8, 12 and 16 the best over made talks (`python -m benchmarks.policies`)."""
WHERE_FULL = 2.0
"""Times more where caches are full, so that what is computed twice pushes out others': of 1, 1.5, 2 and 4 the best over
Mooncake's conversations."""


def _sequences(request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[float]:
    return [node.sequences for node in nodes]


def _prefill_tokens(request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[float]:
    now = request.now
    return [
        node.prefill_tokens if node.prefills != 1 and node.told is None else node.ahead_tokens(now) for node in nodes
    ]


def _remote_tokens(request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[float]:
    tokens = _remote_prefix(request, nodes)
    if not request.documents or not any(hits.in_reach for hits in request.documents.values()):
        return tokens
    return [number + request.documents_for(node).elsewhere(node.id) for number, node in zip(tokens, nodes, strict=True)]


def _remote_prefix(request: RouteRequest, nodes: Sequence[NodeView]) -> Sequence[float]:
    if not request.hits or not any(hits.longest for hits in request.hits.values()):
        return no_scores(len(nodes))
    if any(hits.each_its_own for hits in request.hits.values()):  # what it lacks it computes: no loading
        hits = [request.hits_for(node) for node in nodes]
        return [
            (found.longest - found.in_reach_of(node.id)) * COMPUTE_OVER_LOAD * (WHERE_FULL if found.full else 1.0)
            for node, found in zip(nodes, hits, strict=True)
        ]
    if len({node.fingerprint for node in nodes}) > 1:
        hits = [request.hits_for(node) for node in nodes]
        return [
            (found.longest - found.by_node.get(node.id, 0)) * node.chunk_tokens
            for node, found in zip(nodes, hits, strict=True)
        ]
    found = request.hits_for(nodes[0])
    longest, held = found.longest, found.by_node.get
    tokens = [(longest - held(node.id, 0)) * node.chunk_tokens for node in nodes]
    return _slowed(tokens, nodes, found.machine, request.now) if found.machine else tokens


def _slowed(
    tokens: Sequence[float], nodes: Sequence[NodeView], machine: str, now: float, limits: RateLimits = RateLimits()
) -> Sequence[float]:
    """More of them for a node whose link to this machine, where they lie, is known to be slower than others' are."""
    pairs = [node.read_rates.get(machine) for node in nodes]
    fresh = [pair.per_s if pair is not None and now - pair.at < limits.pair_s else 0.0 for pair in pairs]
    if (best := max(fresh)) == 0.0:
        return tokens
    return [
        number * min(limits.most_slow, best / rate) if 0.0 < rate * limits.slow_pair < best else number
        for number, rate in zip(tokens, fresh, strict=True)
    ]


def _handing_over(request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[float]:
    there = decoder.machine if decoder is not None else ""
    measured = [node.put_rates for node in nodes] if there else []
    rates = [node.put_rate(there, request.now) for node in nodes] if any(measured) else []
    if not any(rates):
        return no_scores(len(nodes))
    known = [_beyond_computing(request, node, rate) if rate else None for node, rate in zip(nodes, rates, strict=True)]
    least = min(tokens for tokens in known if tokens is not None)
    return [
        0.0 if node.machine == there else least if tokens is None else tokens
        for node, tokens in zip(nodes, known, strict=True)
    ]


def _beyond_computing(request: RouteRequest, node: NodeView, rate: float) -> float:
    """Chunks are written while the next ones are computed."""
    size = node.kv_spec.chunk_bytes if node.kv_spec is not None else 0
    full = usable_chunks(request.prompt_tokens, node.chunk_tokens)
    cached = min(full, request.hits_for(node).in_reach_of(node.id))
    rest = request.prompt_tokens - cached * node.chunk_tokens
    return max(0.0, (full - cached) * size / rate * node.prefill_rate - rest)


def _tier_tokens(request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[float]:
    if not request.hits or not any(hits.in_tiers for hits in request.hits.values()):
        return no_scores(len(nodes))
    return promoting_tokens(request, nodes)


def spread(name: bytes, nodes: Sequence[NodeView]) -> Sequence[float]:
    """A number between 0 and 1 for each node, by rendezvous hashing: a name has the same ones each time, and a node
    that comes or goes changes no other's."""
    seed = xxhash.xxh3_64_intdigest(name)
    return [xxhash.xxh3_64_intdigest(node.id.encode(), seed) / 2**64 for node in nodes]


def session_name(request: RouteRequest) -> bytes:
    """Empty: the client names no session."""
    return request.session.encode("utf-8", "surrogatepass")


def _sessions(request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[float]:
    return spread(session_name(request), nodes) if request.session else no_scores(len(nodes))


SEQUENCES = Scorer("sequences", _sequences)
"""Requests that run or wait on the node."""
PREFILL_TOKENS = Scorer("prefill_tokens", _prefill_tokens)
"""Tokens of prompts that this router has sent the node and that it has not yet answered; of a single prompt those that
are left after so long."""
REMOTE_TOKENS = Scorer("remote_tokens", _remote_tokens)
"""Cached tokens of the prompt that lie on other nodes: the node would have to bring them over, or, where
nodes cannot read each other's, to compute them, which counts so many times."""
TIER_TOKENS = Scorer("tier_tokens", _tier_tokens)
"""What tiers have of the prompt behind what is in memory, in tokens that the node would compute in the time in which it
has it: a node on whose disk it lies has it sooner than one that must have it brought by way of another."""
HANDING_OVER = Scorer("handing_over", _handing_over)
"""What a prefiller could compute in the time in which it only writes what it has computed to the decoder's machine. A
link of which nothing was measured of late is taken to be as good as the best."""
SESSIONS = Scorer("session", _sessions)
"""Between 0 and 1, the least on the session's own node: so little that it only decides between nodes that are equal."""
