"""Where the cached tokens of a request came from, as its legs told. Pure.

A leg says how many leading prompt tokens it did not compute, which bytes it moved out of segments, and what was brought
from tiers into segments for it. So what came out of segments is known by its bytes, what of it came from tiers by the
chunks promoted, and the engine's own prefix cache had the rest.
"""

from collections import Counter
from collections.abc import Sequence

from kvcore.types import KVSpec
from router.requests.records import LegRecord

_HEADER_BYTES = 128  # in front of each chunk (docs/wire-formats.md)


def _fetched_bytes(legs: Sequence[LegRecord], cached_tokens: int) -> int:
    """Out of segments, by the leg that counted the request's cached tokens: of a prefill and a decode leg the one with
    fewer, as the decoder also takes for cached what the prefiller has just computed. Where both have as many it is the
    one that fetched: a prefiller does not fetch a prompt of which all is stored."""
    counted = [leg for leg in legs if leg.cached_tokens == cached_tokens and leg.error is None]
    gets = (sum(move.num_bytes for move in leg.moved if move.direction == "get") for leg in counted)
    return max(gets, default=0)


def cached_by_source(legs: Sequence[LegRecord], cached_tokens: int, spec: KVSpec | None) -> tuple[dict[str, int], int]:
    """(cached tokens by source, tokens promoted and not used). `spec`: of the KV; None where there is no store."""
    if not cached_tokens and not any(leg.promoted for leg in legs):
        return {}, 0
    if spec is None:
        return ({"engine": cached_tokens} if cached_tokens else {}), 0
    chunks = round(_fetched_bytes(legs, cached_tokens) / (spec.chunk_bytes + _HEADER_BYTES))
    stored = min(cached_tokens, chunks * spec.chunk_tokens)
    promoted: Counter[str] = Counter()
    for leg in legs:
        for one in leg.promoted:
            promoted[one.tier] += one.num_chunks * spec.chunk_tokens
    sources: Counter[str] = Counter(engine=cached_tokens - stored)
    left = stored
    for tier, tokens in promoted.items():
        sources[tier] = min(left, tokens)
        left -= sources[tier]
    sources["memory"] = left
    return dict(+sources), promoted.total() - sum(sources[tier] for tier in promoted)
