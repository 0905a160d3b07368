"""What a prompt's reuse costs: the distributions of two ways to compute it, token by token."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engines.paged.leg import Leg
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.messages import GenerateRequest
from nodeapi.sampling import SamplingParams

LogProbabilities = npt.NDArray[np.float32]


def one_way(request: CompareRequest, *, reuse: bool) -> GenerateRequest:
    """What a comparison runs: greedy, and, led along the tokens of the full way, no longer than that."""
    return GenerateRequest(
        request_id=f"{request.request_id}/{'reused' if reuse else 'full'}",
        prompt_token_ids=request.prompt_token_ids,
        sampling=SamplingParams(temperature=0.0, max_tokens=request.num_tokens, ignore_eos=reuse),
        cache_salt=request.cache_salt,
        deadline_s=request.deadline_s,
        documents=request.documents if reuse else None,
        reuse=reuse,
    )


def divergence(full: LogProbabilities, other: LogProbabilities) -> float:
    """Kullback-Leibler divergence of `other` from `full`, in nats. Both are of one vocabulary. What `full` rules out
    counts for nothing; what `other` alone rules out makes it infinite, and so does what is no number in either."""
    if _lacks_numbers(full, other):
        return math.inf
    wide, said = full.astype(np.float64), np.exp(full.astype(np.float64))
    possible = said > 0
    return max(0.0, float(np.sum(said[possible] * (wide[possible] - other.astype(np.float64)[possible]))))


def gap(full: LogProbabilities, other: LogProbabilities) -> float:
    """How much less likely, by `full`, the token is that `other` finds likeliest; nats. Infinite where one of them has
    what is no number: nothing is likeliest then."""
    if _lacks_numbers(full, other):
        return math.inf
    return float(full.max() - full[int(other.argmax())])


def _lacks_numbers(full: LogProbabilities, other: LogProbabilities) -> bool:
    return bool(np.isnan(full).any() or np.isnan(other).any())


def compared(request_id: str, full: Leg, reused: Leg, distances: Sequence[float], now: float) -> CompareReply:
    """The reply, of two legs that have ended."""
    pairs = list(zip(full.distributions, reused.distributions, strict=True))
    said = reused.info(now)
    return CompareReply(
        request_id=request_id,
        token_ids=full.first.output,
        distances=list(distances),
        kl=[divergence(one, other) for one, other in pairs],
        gaps=[gap(one, other) for one, other in pairs],
        cached_tokens=said.cached_tokens,
        approximate_tokens=said.approximate_tokens,
        computed_tokens=said.computed_tokens,
        full_s=full.timings(now).compute_s,
        reused_s=said.timings.compute_s,
    )
