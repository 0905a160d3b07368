"""What the ways to a request's first token would take, by what is measured of the nodes, and which of them pays. Pure.

The decoder computes what is not cached, or a prefiller does and hands it over; either loads what is cached from its own
memory or from others'. What nothing was measured of is not guessed: then the way is not in the comparison.
"""

import msgspec

from kvcore.chunk_keys import usable_chunks
from kvcore.types import Role
from router.routing.views import NodeView, RouteRequest


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """`node` computes. Seconds: until it gets to this request, for loading what is cached, for computing the rest, for
    handing that over to the decoder; `expected_s`: from the choice to the first token."""

    node: str
    role: Role
    queue_s: float
    load_s: float
    compute_s: float
    handoff_s: float = 0.0
    expected_s: float


def ways(request: RouteRequest, decoder: NodeView, prefiller: NodeView | None) -> tuple[Way, ...]:
    """Those of which all is known: the decoder's, then the prefiller's."""
    here = _by(request, decoder, decoder)
    there = _by(request, prefiller, decoder) if prefiller is not None else None
    return tuple(way for way in (here, there) if way is not None)


def pays_to_stay(found: tuple[Way, ...]) -> bool:
    """Whether the decoder should compute, though there is a prefiller: loading and handing over would take that one
    longer than the decoder takes to compute, so that it would be kept from prompts of which it saves more; and the
    first token does not come later."""
    if len(found) < 2:
        return False
    here, there = found
    return there.load_s + there.handoff_s > here.compute_s and here.expected_s <= there.expected_s


def worth_waiting_s(found: tuple[Way, ...], *, least_s: float = 1.0, patience: float = 2.0) -> float | None:
    """How long a decoder should wait for a prefiller's KV: `patience` times what that should take and what computing
    takes itself. Then it begins to compute, and what is there first counts. None: not known."""
    if len(found) < 2:
        return None
    here, there = found
    return max(least_s, patience * (there.expected_s + here.compute_s))


def _by(request: RouteRequest, node: NodeView, decoder: NodeView) -> Way | None:
    chunk_tokens, spec = node.chunk_tokens, node.kv_spec
    full = usable_chunks(request.prompt_tokens, chunk_tokens)
    hits = request.hits_for(node)
    cached = min(hits.in_reach_of(node.id), full)
    own = min(hits.by_node.get(node.id, 0), cached)
    rest = request.prompt_tokens - cached * chunk_tokens
    chunk_bytes = spec.chunk_bytes if spec is not None else 0
    load_s = _moving_s(own * chunk_bytes, node.near_rate) + _moving_s((cached - own) * chunk_bytes, node.far_rate)
    if not node.prefill_rate or load_s == float("inf"):
        return None
    queue_s, compute_s, handoff_s = node.prefill_tokens / node.prefill_rate, rest / node.prefill_rate, 0.0
    if node is not decoder and decoder.near_rate:
        handoff_s = (full - cached) * chunk_bytes / decoder.near_rate
    total_s = queue_s + load_s + compute_s + handoff_s + decoder.step_s
    return Way(
        node=node.id,
        role=node.role,
        queue_s=queue_s,
        load_s=load_s,
        compute_s=compute_s,
        handoff_s=handoff_s,
        expected_s=total_s,
    )


def _moving_s(num_bytes: float, rate: float) -> float:
    if not num_bytes:
        return 0.0
    return num_bytes / rate if rate else float("inf")
