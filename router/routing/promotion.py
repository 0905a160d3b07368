"""What a node would bring from tiers before it computes a prompt, and how long that should take. Pure.

A node loads from the tiers that it reaches itself; what lies on another node's disk that node loads for it
(`kvnode.tiers.promoter`). What it would have computed sooner it computes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from kvcore.chunk_keys import usable_chunks
from kvcore.types import Role
from router.routing.index import PrefixHits
from router.routing.views import ClusterView, NodeView, RouteRequest

PEER = "peer"
"""The tier of a promotion from another node's disk."""
LOAD_SHARE = 0.5
"""Of the time in which a chunk is computed, in which it comes from a tier, while nothing was measured. A tier is slower
than memory, of which it is a quarter."""
FAR_SHARE = 0.25
"""More of it where it comes by way of another node."""


class Promotion(NamedTuple):
    """So many chunks behind those in memory, of which the node loads the first `near` itself. `seconds` inf: not known.
    `computes_s`: to compute them instead; inf: not known."""

    chunks: int = 0
    near: int = 0
    tier: str = ""
    seconds: float = 0.0
    computes_s: float = float("inf")

    @property
    def pays(self) -> bool:
        """Whether the node will load: unless computing is known to be faster."""
        return self.chunks > 0 and (self.seconds == float("inf") or self.seconds <= self.computes_s)


NO_PROMOTION = Promotion()


def offered(request: RouteRequest, node: NodeView) -> Promotion:
    """What tiers have for this node, whether it pays to load it or not."""
    hits, tiers = request.hits_for(node), node.tiers
    if not hits.in_tiers or not (tiers.disk or tiers.shared):
        return NO_PROMOTION
    chunks = min(hits.in_tiers, usable_chunks(request.prompt_tokens, node.chunk_tokens) - hits.longest)
    if chunks <= 0:
        return NO_PROMOTION
    disk = (hits.on_disk.get(node.id, 0) if tiers.disk else 0, tiers.disk, tiers.disk_rate)
    shared = (hits.in_shared if tiers.shared else 0, tiers.shared, tiers.shared_rate)
    reached = [one for one in (disk, shared) if one[0]]
    near = min(chunks, max((number for number, _, _ in reached), default=0))
    _, tier, rate = max(reached or [(0, PEER, request.peer_rate)], key=lambda one: one[2] or float("inf"))
    size = node.kv_spec.chunk_bytes if node.kv_spec is not None else 0
    compute_rate = node.prefill_rate or request.compute_rate
    if node.role is Role.DECODER:  # a prefiller would compute them for it
        compute_rate = max(compute_rate, request.compute_rate)
    computes_s = chunks * node.chunk_tokens / compute_rate if compute_rate else float("inf")
    return Promotion(chunks, near, tier, chunks * size / rate if rate else float("inf"), computes_s)


def expected(request: RouteRequest, node: NodeView) -> Promotion:
    """What the node will load."""
    if not request.hits:
        return NO_PROMOTION
    found = offered(request, node)
    return found if found.pays else NO_PROMOTION


def with_rates(request: RouteRequest, view: ClusterView) -> RouteRequest:
    """The request, which knows how fast others could compute or load for a node."""
    if not request.hits or not any(hits.in_tiers for hits in request.hits.values()):
        return request
    holders = [node for node in (*view.prefillers, *view.decoders) if node.id in request.hits_for(node).on_disk]
    return replace(
        request,
        compute_rate=max([0.0, *(node.prefill_rate for node in view.prefillers)]),
        peer_rate=max([0.0, *(node.tiers.disk_rate for node in holders)]),
    )


def promoting_tokens(request: RouteRequest, nodes: Sequence[NodeView]) -> Sequence[float]:
    """For each node the tokens that it could compute in the time in which it has what tiers have of the prompt, loaded
    as far as that pays and computed else."""
    kinds: dict[bytes, list[NodeView]] = {}
    for node in nodes:
        kinds.setdefault(node.fingerprint, []).append(node)
    reached = {kind: _reached(request, of_kind[0]) for kind, of_kind in kinds.items()}
    most, found = max(reached.values()), dict[str, float]()
    for kind, of_kind in kinds.items():
        own, others = _tokens_of(request.hits_for(of_kind[0]), of_kind)
        computes = most - reached[kind]  # what only nodes of another kind of KV can have
        found.update((node.id, computes + own.get(node.id, others)) for node in of_kind)
    return [found[node.id] for node in nodes]


def _reached(request: RouteRequest, node: NodeView) -> int:
    """Tokens of the prompt that are in some memory or tier."""
    hits = request.hits_for(node)
    return (hits.longest + hits.in_tiers) * node.chunk_tokens


def _tokens_of(hits: PrefixHits, nodes: Sequence[NodeView]) -> tuple[dict[str, float], float]:
    """(Those of the nodes on whose disks some of it lies, those of any other.)"""
    shares = {node.id: _share(node) for node in nodes if node.id in hits.on_disk}
    by_peer = min(1.0, min(shares.values(), default=LOAD_SHARE) + FAR_SHARE)
    chunk_tokens, number, shared = nodes[0].chunk_tokens, hits.in_tiers, hits.in_shared
    others = chunk_tokens * (shared * LOAD_SHARE + (number - shared) * by_peer)
    own = {
        name: min(others, chunk_tokens * (hits.on_disk[name] * share + (number - hits.on_disk[name]) * by_peer))
        for name, share in shares.items()
    }
    return own, others


def _share(node: NodeView) -> float:
    """Of the time in which it computes a chunk, in which it loads it from its disk."""
    size = node.kv_spec.chunk_bytes if node.kv_spec is not None else 0
    if not (node.tiers.disk_rate and node.prefill_rate and size):
        return LOAD_SHARE
    return min(1.0, size / node.tiers.disk_rate * node.prefill_rate / node.chunk_tokens)
