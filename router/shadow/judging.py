"""What a comparison of exact reuse says: rounding, or chunks that are wrong, and by what way those had come. Pure."""

from collections.abc import Mapping, Sequence
from math import inf, isnan
from typing import NamedTuple

from kvcore.types import KVSpec
from nodeapi.documents import CompareReply
from router.requests.records import LegRecord


class Tolerance(NamedTuple):
    """What rounding makes at most. `distance`: as in `CompareReply`; `gap`: of a token that is as likely, nats."""

    distance: float
    gap: float


_FLOAT32, _COARSE = Tolerance(1e-3, 0.01), Tolerance(0.1, 0.5)
"""A hundred times what was measured between orders of computing (1e-6 with float32) and ten times (1e-2 with
bfloat16): a flipped bit that is smaller changes no answer."""


def at_most(value: float, most: float) -> float:
    """The value, or `most` if it is greater, or no number."""
    return value if value <= most else most


def tolerance(spec: KVSpec) -> Tolerance:
    """Of KV of this kind. What is declared of it (a lossy codec, a quantized model) may round, too."""
    return _FLOAT32 if spec.dtype == "float32" and not spec.declared else _COARSE


class ReuseVerdict(NamedTuple):
    """`wrong`: numbers of the chunks, in their prompt; empty with `diverged`: which could not be told."""

    diverged: bool
    wrong: list[int]
    gap: float


def verdict(reply: CompareReply, allowed: Tolerance) -> ReuseVerdict:
    """Of a comparison without documents."""
    wrong = [number for number, distance in enumerate(reply.distances) if not distance <= allowed.distance]
    gap = max((inf if isnan(gap) else gap for gap in reply.gaps), default=0.0)
    return ReuseVerdict(bool(wrong) or not gap <= allowed.gap, wrong, gap)


def sources(legs: Sequence[LegRecord], node: str, machines: Mapping[str, str]) -> list[str]:
    """How a node got a prompt's chunks, as the legs of its request told: by transport and out of whose memory, out of
    which tier. `machines`: by host id, the nodes there. Empty: it had them in its engine's own blocks."""
    found = dict[str, None]()
    for leg in legs:
        for one in leg.promoted:
            found[f"tier {one.tier} of {one.node or leg.node}"] = None
        for move in (one for one in leg.moved if one.num_bytes):
            there = machines.get(move.machine) or "a machine that is not known"
            if move.direction == "get" and leg.node == node:
                found[f"read over {move.transport} out of the memory of {there}"] = None
            elif move.direction == "put" and leg.node != node:
                found[f"written over {move.transport} by {leg.node}"] = None
    return list(found)
