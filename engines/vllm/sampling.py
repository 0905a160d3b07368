"""Our sampling parameters as vLLM's, and vLLM's logprobs and finish reasons as ours. Values only: needs no vLLM."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from engines.vllm.connector.orders import PARAMS_NAME, LegParams
from kvcore.errors import EngineError
from nodeapi.messages import FinishReason, GenerateRequest, TokenLogprob
from nodeapi.prompt_logprobs import MOST_ENTRIES, PromptLogprobs, PromptRow
from nodeapi.sampling import SamplingParams


class VllmLogprob(Protocol):
    """vllm.logprobs.Logprob, as far as we read it. `rank` 1: the likeliest."""

    logprob: float
    rank: int | None


def sampling_arguments(request: GenerateRequest, leg: LegParams) -> dict[str, object]:
    """Keyword arguments of vLLM's SamplingParams for the tokens that are still to come.

    A continued request is a prompt to vLLM: its limits are lowered by what was emitted. Presence and frequency
    penalties count, in vLLM, what this engine generates; a continuation counts anew, and begins no bad word before it.
    """
    sampling, emitted = request.sampling, len(request.output_token_ids)
    return {
        "n": 1 if is_greedy(sampling) else sampling.n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": _seed(sampling.seed, emitted) if sampling.temperature > 0 else None,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "max_tokens": sampling.max_tokens - emitted,
        "min_tokens": max(0, sampling.min_tokens - emitted),
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": sampling.ignore_eos,
        "allowed_token_ids": list(sampling.allowed_token_ids) or None,
        "_bad_words_token_ids": [list(word) for word in sampling.bad_words_token_ids] or None,
        "thinking_token_budget": sampling.thinking_token_budget,
        "logprobs": None if sampling.logprob_token_ids else sampling.logprobs,
        "logprob_token_ids": sampling.logprob_token_ids or None,
        "prompt_logprobs": sampling.prompt_logprobs,
        "detokenize": False,
        "extra_args": {**sampling.extra_args, **extra_args(leg)},
    }


def grammar_place(request: GenerateRequest) -> dict[str, Any]:
    """Fields of LegParams that say where in the answer the grammar begins."""
    grammar = request.sampling.grammar
    if grammar is None:
        return {}
    return {"emitted": len(request.output_token_ids), "after": grammar.after, "opening": grammar.opening}


def is_greedy(sampling: SamplingParams) -> bool:
    """Whether all completions are the same. vLLM refuses to compute more than one of them, and one is enough."""
    return sampling.temperature == 0


def extra_args(leg: LegParams) -> dict[str, object]:
    """SamplingParams' `extra_args`: our entry in the request's kv_transfer_params."""
    return {"kv_transfer_params": {PARAMS_NAME: msgspec.to_builtins(leg)}}


def _seed(seed: int, emitted: int) -> int:
    """vLLM draws from a generator seeded once a request: a continuation must not draw the first draws again."""
    return (seed + emitted * 0x9E3779B97F4A7C15) % (1 << 63)


def token_logprobs(
    token_ids: Sequence[int], positions: Sequence[Mapping[int, VllmLogprob]] | None, sampling: SamplingParams
) -> list[TokenLogprob] | None:
    """vLLM's logprobs of the tokens of one delta, as ours: of the emitted token, and of those that were asked for.

    Raises EngineError if vLLM left one out.
    """
    if sampling.logprobs is None:
        return None
    if positions is None or len(positions) != len(token_ids):
        raise EngineError(f"vLLM gave logprobs of {len(positions or ())} positions for {len(token_ids)} tokens")
    return [
        TokenLogprob(logprob=position[token].logprob, top=_told(position, sampling))
        for token, position in zip(token_ids, positions, strict=True)
    ]


def _told(position: Mapping[int, VllmLogprob], sampling: SamplingParams) -> list[tuple[int, float]]:
    if sampling.logprob_token_ids:
        return [(token, position[token].logprob) for token in sampling.logprob_token_ids]
    return _likeliest(position, sampling.logprobs or 0)


def _likeliest(position: Mapping[int, VllmLogprob], count: int) -> list[tuple[int, float]]:
    likely = [(other, entry.logprob) for other, entry in position.items() if (entry.rank or 0) <= count]
    return sorted(likely, key=lambda pair: -pair[1])[:count]


def prompt_logprobs(
    prompt: Sequence[int], positions: Sequence[Mapping[int, VllmLogprob] | None] | None, sampling: SamplingParams
) -> Iterator[PromptLogprobs]:
    """vLLM's logprobs of a prompt's tokens, as ours, piece by piece. None where none are wanted; raises EngineError if
    vLLM left one out."""
    top = sampling.prompt_logprobs
    if top is None:
        return
    if positions is None or len(positions) != len(prompt):
        raise EngineError(f"vLLM gave logprobs of {len(positions or ())} tokens for a prompt of {len(prompt)}")
    step = max(1, MOST_ENTRIES // (1 + top))
    for start in range(1, len(prompt), step):
        rows: list[PromptRow] = []
        for token, position in zip(prompt[start : start + step], positions[start : start + step], strict=True):
            if position is None or len(best := _likeliest(position, top)) != top:
                raise EngineError("vLLM left logprobs of the prompt out")
            own = position[token]
            rows.append(PromptRow(token, own.logprob, own.rank or 1, best))
        yield PromptLogprobs.pack(start, top, rows)


def finish(
    reason: str | None, stop_reason: int | str | None, token_ids: Sequence[int]
) -> tuple[FinishReason, int | None]:
    """vLLM's finish reason as ours, with the token that stopped it. Raises EngineError for a failure inside vLLM."""
    match reason:
        case "stop":
            last = token_ids[-1] if token_ids else None
            return FinishReason.STOP, stop_reason if isinstance(stop_reason, int) else last
        case "length":
            return FinishReason.LENGTH, None
        case "abort":
            return FinishReason.ABORT, None
        case _:
            raise EngineError(f"vLLM ended the request with {reason!r}: see its log")
