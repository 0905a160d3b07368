"""What the ways to a request's first token would take, by what is measured of the nodes, and which of them pays. Pure.

The decoder computes what is not cached, or a prefiller does and hands it over; either loads what is cached from its own
memory or from others', or has it brought from a tier first (`router.routing.promotion`). Documents that are there the
decoder loads, whoever computes the others. What nothing was measured of is not guessed: then the way is not in the
comparison.
"""

from math import inf
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from kvcore.chunk_keys import usable_chunks
from kvcore.types import Role
from router.documents.hits import NO_DOCUMENTS
from router.routing.limits import RateLimits
from router.routing.promotion import NO_PROMOTION, Promotion, expected, offered
from router.routing.rates import NO_DOUBT, RateKind
from router.routing.views import NodeView, RouteRequest


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """`node` computes. Seconds: until it gets to this request, for what it brings from `tier` meanwhile, for loading
    what is cached, for computing the rest, for handing that over to the decoder; `expected_s`: from the choice to the
    first token. `tier` empty: it brings nothing from one; `router.routing.promotion.PEER`: from another node's disk."""

    node: str
    role: Role
    tier: str = ""
    queue_s: float
    promote_s: float = 0.0
    load_s: float
    compute_s: float
    handoff_s: float = 0.0
    expected_s: float


def ways(request: RouteRequest, decoder: NodeView, prefiller: NodeView | None) -> tuple[Way, ...]:
    """Those of which all is known: the decoder's, then the prefiller's."""
    here = _by(request, decoder, decoder, expected(request, decoder))
    if prefiller is None:
        return () if here is None else (here,)
    there = _by(request, prefiller, decoder, expected(request, prefiller))
    return tuple([way for way in (here, there) if way is not None])


def other_ways(request: RouteRequest, decoder: NodeView, prefiller: NodeView | None) -> tuple[Way, ...]:
    """What the same nodes' would take if they computed what they load from a tier, or loaded what they compute."""
    found: list[Way] = []
    for node in (decoder, prefiller) if request.hits else ():
        if node is not None and (offer := offered(request, node)).chunks:
            other = _by(request, node, decoder, NO_PROMOTION if offer.pays else offer)
            found += [other] if other is not None else []
    return tuple(found)


def pays_to_stay(found: tuple[Way, ...]) -> bool:
    """Whether the decoder should compute, though there is a prefiller: loading and handing over would take that one
    longer than the decoder takes to compute, so that it would be kept from prompts of which it saves more; and the
    first token does not come later."""
    if len(found) < 2:
        return False
    here, there = found
    return there.load_s + there.handoff_s > here.compute_s and here.expected_s <= there.expected_s


class Blamed(NamedTuple):
    """A rate of a node that speaks against a way. `machine`: of `put`."""

    node: str
    kind: RateKind
    machine: str = ""


class WayChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Of the two ways. `stays`: the decoder computes. `blamed`: the rate that speaks most against the other way; None:
    none does. `tries`: it is doubted, and the way that it speaks against is taken all the same. `weighed`: by what they
    take; False: the decoder computes only when it is needed, and waits as long as it may."""

    stays: bool = False
    blamed: Blamed | None = None
    tries: bool = False
    weighed: bool = True


def choose_way(
    request: RouteRequest,
    found: tuple[Way, ...],
    decoder: NodeView,
    prefiller: NodeView | None,
    limits: RateLimits = RateLimits(),
) -> WayChoice:
    """Two cases, each with its exception, where the ways are to be weighed at all:

    1. It pays to stay. The prefiller's way is tried if the rate that makes most of its moving is doubted: it is not
       waited for much longer than computing takes (`worth_waiting_s`).
    2. It does not. The decoder's way is tried if that would take little longer, what is known of its computing is
       doubted, and staying would pay if it computed as fast as the prefiller.
    """
    if len(found) < 2 or prefiller is None or not request.weighs:
        return WayChoice(weighed=request.weighs)
    here, there = found
    if pays_to_stay(found):
        in_time = there.queue_s + there.compute_s <= limits.ready_share * _try_s(here, limits)
        moves = _moves(request, prefiller, decoder, expected(request, prefiller), _chunks(request, prefiller))
        blamed = _blamed(moves, prefiller, decoder) if in_time else None
        doubts = decoder.doubts if blamed is not None and blamed.node == decoder.id else prefiller.doubts
        tries = blamed is not None and doubts.get(blamed[1:], NO_DOUBT).is_due(request.now, limits)
        return WayChoice(stays=not tries, blamed=blamed, tries=tries)
    if here.expected_s > there.expected_s + limits.least_wait_s or decoder.prefill_rate >= prefiller.prefill_rate:
        return WayChoice()
    faster_s = here.compute_s * decoder.prefill_rate / prefiller.prefill_rate
    as_fast = replace(here, compute_s=faster_s, expected_s=here.expected_s - here.compute_s + faster_s)
    if not pays_to_stay((as_fast, there)):
        return WayChoice()
    tries = decoder.doubts.get(("compute", ""), NO_DOUBT).is_due(request.now, limits)
    return WayChoice(stays=tries, blamed=Blamed(decoder.id, "compute"), tries=tries)


def worth_waiting_s(found: tuple[Way, ...], *, tries: bool = False, limits: RateLimits = RateLimits()) -> float | None:
    """How long a decoder should wait for a prefiller's KV: `patience` times what that should take and what computing
    takes itself, and where that way is only tried, what computing takes. Then it begins to compute, and what is there
    first counts. None: not known."""
    if len(found) < 2:
        return None
    here, there = found
    if tries:
        return _try_s(here, limits)
    return max(limits.least_wait_s, limits.patience * (there.expected_s + here.compute_s))


def _try_s(here: Way, limits: RateLimits) -> float:
    return max(limits.least_wait_s, limits.patience * here.expected_s)


def _chunks(request: RouteRequest, node: NodeView) -> tuple[int, int]:
    """(full ones of the prompt, those of them that are cached in memory where it reaches them)."""
    full = usable_chunks(request.prompt_tokens, node.chunk_tokens)
    return full, min(request.hits_for(node).in_reach_of(node.id), full)


def _moves(
    request: RouteRequest, node: NodeView, decoder: NodeView, promotion: Promotion, chunks: tuple[int, int]
) -> tuple[float, ...]:
    """Seconds for which KV is on its way; inf: not known. What `node` loads out of its own machine's memory, and out of
    others'; then, of a prefiller, what it writes for a decoder of another machine, and what that one reads on its own
    machine, and from others: of the prefiller's, and of documents that are there. `_blamed` names them in this order.
    `chunks`: see the function of this name."""
    full, cached = chunks
    size = node.kv_spec.chunk_bytes if node.kv_spec is not None else 0
    near_s = far_s = read_near_s = read_far_s = 0.0
    if cached or promotion.chunks:
        hits = request.hits_for(node)
        own, by_peers = min(hits.by_node.get(node.id, 0), cached), promotion.chunks - promotion.near
        near_s = _moving_s((own + promotion.near) * size, node.near_rate)
        read_rate = node.read_rate(hits.machine, request.now)
        far_s = _moving_s((cached - own) * size, read_rate) + _moving_s(by_peers * size, node.far_rate)
    documents = request.documents_for(decoder)  # those that are there the decoder loads, whoever computes the others
    token_bytes = size / node.chunk_tokens
    if documents is not NO_DOCUMENTS:
        read_near_s = _moving_s(documents.by_node.get(decoder.id, 0.0) * token_bytes, decoder.near_rate)
        read_far_s = _moving_s(documents.elsewhere(decoder.id) * token_bytes, decoder.far_rate)
    if node is decoder:
        return near_s + read_near_s, far_s + read_far_s
    handed = max(0.0, (full - cached - promotion.chunks) * size - documents.in_reach * token_bytes)
    put_rate = node.put_rate(decoder.machine, request.now)
    put_s = handed / put_rate if put_rate else 0.0
    handed_s = handed / decoder.near_rate if decoder.near_rate else 0.0
    return near_s, far_s, put_s, handed_s + read_near_s, read_far_s


def _blamed(moves: tuple[float, ...], prefiller: NodeView, decoder: NodeView) -> Blamed:
    """The rate that makes most of a prefiller's `_moves`."""
    by = (
        Blamed(prefiller.id, "near"),
        Blamed(prefiller.id, "far"),
        Blamed(prefiller.id, "put", decoder.machine),
        Blamed(decoder.id, "near"),
        Blamed(decoder.id, "far"),
    )
    return by[moves.index(max(moves))]


def _by(request: RouteRequest, node: NodeView, decoder: NodeView, promotion: Promotion) -> Way | None:
    chunks = _chunks(request, node)
    near_s, far_s, *handing = _moves(request, node, decoder, promotion, chunks)
    rest = request.prompt_tokens - (chunks[1] + promotion.chunks) * node.chunk_tokens
    rest -= request.documents_for(node).in_reach
    queue_s = compute_s = handoff_s = 0.0
    if node.prefill_rate:
        queue_s, compute_s = node.ahead_tokens(request.now) / node.prefill_rate, rest / node.prefill_rate
    elif rest > node.chunk_tokens:  # a part of a chunk takes the one step
        return None
    if handing:
        put_s, read_near_s, read_far_s = handing
        # chunks are written while the next ones are computed
        handoff_s = max(0.0, put_s - compute_s) + read_near_s + read_far_s
    load_s = near_s + far_s
    total_s = max(queue_s, promotion.seconds) + load_s + compute_s + handoff_s + decoder.step_s
    if total_s == inf:
        return None
    return Way(
        node=node.id,
        role=node.role,
        tier=promotion.tier,
        queue_s=queue_s,
        promote_s=promotion.seconds,
        load_s=load_s,
        compute_s=compute_s,
        handoff_s=handoff_s,
        expected_s=total_s,
    )


def _moving_s(num_bytes: float, rate: float) -> float:
    if not num_bytes:
        return 0.0
    return num_bytes / rate if rate else inf
