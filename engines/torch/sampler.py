"""Picks tokens from logits.

Owns penalties, masks, truncation and the draw. Order: logit_bias, repetition, presence and frequency penalties,
min_tokens, allowed and banned tokens, grammar, temperature, top_k, top_p, min_p. Invariant: a draw depends on its own
row and on (seed, index, position) alone, never on who else is in the batch, so that another engine can go on with a
sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch

from engines.paged.runner import Sampled, SampleSpec
from nodeapi.messages import TokenLogprob
from nodeapi.sampling import SamplingParams

_WORD = (1 << 64) - 1
_HUGE = 1e30
_COLDEST = 1e-5
"""Draws as greedy does. Together: whatever a request asks for, its row stays finite, as one that is not would fail all
that share the step."""


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1): Philox4x64, key (seed, index), counter position; the top 53 bits of the first word."""
    # Typed: in a plain list a seed above 2**63 would go through a float and lose its low bits.
    key = np.array([seed & _WORD, index], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=np.array([position, 0, 0, 0], dtype=np.uint64))
    return float(int(generator.random_raw()) >> 11) * 2.0**-53


def sample_rows(logits: torch.Tensor, specs: Sequence[SampleSpec], eos_token_ids: Sequence[int]) -> list[list[Sampled]]:
    """Draw for each row of `logits` ([number of specs, vocabulary], not changed) one token an index of its spec.

    Nothing for a row that has a NaN or no finite maximum: its KV or the weights are broken.
    """
    best, best_ids = logits.max(dim=-1)
    rows = zip(logits, specs, best_ids.tolist(), torch.isfinite(best).tolist(), strict=True)
    return [_sample_row(row, spec, eos_token_ids, argmax) if finite else [] for row, spec, argmax, finite in rows]


def _sample_row(row: torch.Tensor, spec: SampleSpec, eos_token_ids: Sequence[int], argmax: int) -> list[Sampled]:
    params = spec.params
    row = row.float()
    mask = spec.mask(eos_token_ids)
    if spec.matcher is not None and spec.matcher.problem:
        return []
    if mask is None and _is_plain(spec):
        chosen = [argmax] * len(spec.indices) if params.temperature == 0 else draw_tokens(row, spec)
    else:
        adjusted = adjust_logits(row, spec, eos_token_ids)
        if mask is not None:  # the last word: a bias makes no token likelier than never
            adjusted[~torch.from_numpy(mask)] = -torch.inf
        if params.temperature == 0:
            chosen = [int(adjusted.argmax())] * len(spec.indices)
        else:
            chosen = draw_tokens(adjusted, spec)
    if params.logprobs is None:
        return [Sampled(token_id) for token_id in chosen]
    logprobs = torch.log_softmax(row, dim=-1)
    if params.logprob_token_ids:
        top = [(token_id, float(logprobs[token_id])) for token_id in params.logprob_token_ids]
    else:
        values, ids = logprobs.topk(min(params.logprobs, len(row)))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return [Sampled(token_id, TokenLogprob(logprob=float(logprobs[token_id]), top=top)) for token_id in chosen]


def _is_plain(spec: SampleSpec) -> bool:
    """Whether nothing changes the logits before the temperature."""
    params = spec.params
    return (
        not params.logit_bias
        and params.presence_penalty == params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and len(spec.output) >= params.min_tokens
        and not params.allowed_token_ids
        and not params.bad_words_token_ids
    )


def adjust_logits(row: torch.Tensor, spec: SampleSpec, eos_token_ids: Sequence[int]) -> torch.Tensor:
    """A copy of `row` ([vocabulary], float32) after bias, penalties and masks. All finite."""
    params = spec.params
    row = row.clone()
    if params.logit_bias:
        bias = torch.tensor(list(params.logit_bias.values()), dtype=row.dtype)
        row.index_add_(0, torch.tensor(list(params.logit_bias)), bias)
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(np.array([*spec.prompt, *spec.output], dtype=np.int64)))
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
    if spec.output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(spec.output, dtype=np.int64), return_counts=True)
        penalty = params.presence_penalty + params.frequency_penalty * torch.from_numpy(counts)
        row[torch.from_numpy(ids)] -= penalty.to(row.dtype)
    if len(spec.output) < params.min_tokens:
        ends = [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]
        row[torch.tensor([end for end in ends if end < len(row)], dtype=torch.int64)] = -_HUGE
    if params.allowed_token_ids:
        allowed = torch.tensor(params.allowed_token_ids)
        row = torch.full_like(row, -_HUGE).index_copy_(0, allowed, row[allowed])
    if banned := params.banned_after(spec.output):
        row[torch.tensor(sorted(banned))] = -_HUGE
    return row.nan_to_num_(nan=-_HUGE).clamp_(-_HUGE, _HUGE)


def draw_tokens(row: torch.Tensor, spec: SampleSpec) -> list[int]:
    """One token an index of `spec`, by inverting the distribution's sum in the order of token ids."""
    ids, probabilities = candidates(row, spec.params)
    cumulative = torch.cumsum(probabilities.double(), dim=0)
    position = len(spec.output)
    chosen = []
    for index in spec.indices:
        target = uniform(spec.params.seed, index, position) * float(cumulative[-1])
        where = int(torch.searchsorted(cumulative, target, right=True))
        chosen.append(int(ids[min(where, len(ids) - 1)]))
    return chosen


def candidates(row: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids in ascending order, their probabilities up to a common factor) that may be drawn; at least one.

    As transformers' warpers in their order: temperature, top_k (ties with the k-th stay), top_p, min_p.
    """
    scaled = row / max(params.temperature, _COLDEST)
    ids = torch.arange(len(row))
    if 0 < params.top_k < len(row):
        ids = (scaled >= scaled.topk(params.top_k).values[-1]).nonzero()[:, 0]
        scaled = scaled[ids]
    probabilities = torch.softmax(scaled, dim=-1)
    if params.top_p < 1:
        keep = _nucleus(probabilities, params.top_p)
        ids, probabilities = ids[keep], probabilities[keep]
    if params.min_p > 0:
        keep = probabilities >= params.min_p * probabilities.max()
        ids, probabilities = ids[keep], probabilities[keep]
    return ids, probabilities


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Ascending indices of the likeliest entries, as few as reach `top_p` together."""
    # Sorting a whole vocabulary costs milliseconds; the nucleus nearly always lies in the first few.
    size = min(1024, len(probabilities))
    values, order = probabilities.topk(size)
    if size < len(probabilities) and float(values.sum()) < top_p:
        values, order = probabilities.sort(descending=True)
    before = torch.cumsum(values, dim=0) - values
    keep = before < top_p
    keep[0] = True
    return order[keep].sort().values
