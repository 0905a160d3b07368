"""The fields that say how tokens are picked, as the engines are asked for them."""

import random

import msgspec

from nodeapi.grammars.grammar import Grammar
from nodeapi.sampling import SamplingParams
from router.api.fields.checks import (
    INT64,
    allowed_ids,
    biases,
    number,
    refusal,
    repetition_penalty,
    require,
    stop_ids,
    top_k,
    top_p,
)
from router.api.fields.common_fields import StreamOptions
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.score_fields import AnyRequest, is_prompt_alone, scored
from router.api.limits import ApiLimits
from router.text.model_habits import SamplingDefaults

DEFAULT_COMPLETION_TOKENS = 16


def sampling_of(
    request: AnyRequest,
    prompt_tokens: int,
    max_context: int,
    limits: ApiLimits,
    *,
    bad_words: list[list[int]],
    defaults: SamplingDefaults,
    grammar: Grammar | None = None,
    first: SamplingParams | None = None,
) -> SamplingParams:
    """The engine's parameters, all checked; draws a seed where there is none. `bad_words`: their tokens.
    `first`: those of the first prompt, where this is another one's.

    Without max_tokens a chat may fill the context and a completion has 16 tokens. Raises InvalidRequestError.
    """
    max_tokens, named = max_tokens_of(request, prompt_tokens, max_context, defaults.max_new_tokens)
    min_tokens = request.min_tokens or 0
    if not 0 <= min_tokens <= max_tokens:
        raise refusal("min_tokens", f"must lie between 0 and {named} ({max_tokens})")
    n = 1 if request.n is None else request.n
    if not 1 <= n <= limits.max_n:
        raise refusal("n", f"must lie between 1 and {limits.max_n}")
    if request.stream_options is not None:
        allowed = bool(request.stream) or request.stream_options == StreamOptions()
        require(allowed, "stream_options", "is only allowed when stream is true")
    seed = random.getrandbits(63) if request.seed is None else request.seed
    require(-INT64 <= seed < INT64, "seed", "must be a 64-bit integer")
    if first is not None:  # all else has been checked, and takes long where the lists are long
        return msgspec.structs.replace(first, seed=seed % INT64, max_tokens=max_tokens, grammar=grammar)
    sampling = SamplingParams(
        temperature=number(request.temperature, defaults.temperature, "temperature", 0.0, 2.0),
        top_p=top_p(request.top_p, defaults.top_p),
        top_k=top_k(request.top_k, defaults.top_k),
        min_p=number(request.min_p, defaults.min_p, "min_p", 0.0, 1.0),
        seed=seed % INT64,
        presence_penalty=number(request.presence_penalty, defaults.presence_penalty, "presence_penalty", -2.0, 2.0),
        frequency_penalty=number(request.frequency_penalty, defaults.frequency_penalty, "frequency_penalty", -2.0, 2.0),
        repetition_penalty=repetition_penalty(request.repetition_penalty, defaults.repetition_penalty),
        logit_bias=biases(request.logit_bias, limits.max_biases) if request.logit_bias else {},
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=stop_ids(request.stop_token_ids, limits.max_biases) if request.stop_token_ids else [],
        ignore_eos=bool(request.ignore_eos),
        allowed_token_ids=[] if request.allowed_token_ids is None else allowed_ids(request.allowed_token_ids),
        bad_words=list(request.bad_words or ()),
        bad_words_token_ids=bad_words,
        thinking_token_budget=_thinking_budget(request.thinking_token_budget),
        extra_args=request.vllm_xargs or {},
        logprobs=_logprobs(request, limits.max_logprobs),
        n=n,
        grammar=grammar,
    )
    return scored(request, sampling, limits)


def max_tokens_of(request: AnyRequest, prompt_tokens: int, max_context: int, most: int | None) -> tuple[int, str]:
    """(tokens of the completion, what the client calls that). What is asked for beyond the context's rest is not had,
    as with vLLM, but no more than the whole context may be asked for. `most`: of a chat that says nothing."""
    named, given = "max_tokens", request.max_tokens
    if request.max_completion_tokens is not None:
        named, given = "max_completion_tokens", request.max_completion_tokens
    if given is None:
        room = max(1, max_context - prompt_tokens)
        most = (most or room) if request.fills_context else DEFAULT_COMPLETION_TOKENS
        return min(room, most), named
    require(given >= 1 or is_prompt_alone(request), named, "must be at least 1")
    if given > max_context:
        return min(given, INT64), named  # it has its own refusal; and may have too many digits to be printed
    return max(1, min(given, max_context - prompt_tokens)), named


def _thinking_budget(value: int | None) -> int | None:
    if value is None:
        return None
    require(-1 <= value < INT64, "thinking_token_budget", "must be at least 0, or -1 for no limit")
    return None if value == -1 else value


def _logprobs(request: AnyRequest, most: int) -> int | None:
    if isinstance(request, CompletionRequest):
        if request.logprobs is not None and not 0 <= request.logprobs <= most:
            raise refusal("logprobs", f"must lie between 0 and {most}")
        return request.logprobs
    if request.top_logprobs is not None:
        require(bool(request.logprobs) or request.top_logprobs == 0, "top_logprobs", "needs logprobs to be true")
        if not 0 <= request.top_logprobs <= most:
            raise refusal("top_logprobs", f"must lie between 0 and {most}")
    return (request.top_logprobs or 0) if request.logprobs else None
