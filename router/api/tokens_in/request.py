"""What clients may send to /inference/v1/generate, and the completion that it is.

Source: vLLM's `entrypoints/scale_out/token_in_token_out/protocol.py` and `sampling_params.py`.
"""

from typing import ClassVar

import msgspec

from router.api.fields.checks import refuse, require
from router.api.fields.common_fields import RepetitionDetection, StreamOptions
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.structured import StructuredOutputs

MODES = ("tokens", "text")
_REFUSED = (
    "watermarking",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "logprob_token_ids",
    "routed_experts_prompt_start",
    "trace_decode_token_ids",
)


class GenerateSampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's SamplingParams. The model's own defaults count for `max_tokens` alone, as there."""

    n: int | None = 1
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    max_tokens: int | None = None
    min_tokens: int | None = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    stream_interval: int | None = None
    structured_outputs: StructuredOutputs | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    extra_args: dict[str, str | int | float | list[str | int | float]] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetection | None = None
    detokenize: bool | None = True
    output_kind: object = None
    flat_logprobs: object = None
    skip_clone: object = None
    output_text_buffer_length: object = None
    skip_reading_prefix_cache: object = None
    watermarking: object = None
    prompt_logprob_token_ids: object = None
    prompt_logprob_start: object = None
    logprob_token_ids: object = None
    routed_experts_prompt_start: object = None
    trace_decode_token_ids: object = None


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /inference/v1/generate. `output_mode` `text`: the text beside the tokens. Images are refused."""

    token_ids: list[int]
    sampling_params: GenerateSampling
    model: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = False
    output_mode: str | None = "tokens"
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    priority: int | None = 0
    reasoning_ended: bool | None = None
    reasoning_parser_kwargs: dict[str, object] | None = None
    token_offsets: object = None
    features: object = None
    content_parts: object = None


class GenerateCompletion(CompletionRequest, frozen=True, kw_only=True):
    """The completion that it is: without `max_tokens` it may fill the context."""

    fills_context: ClassVar[bool] = True


def completion_of(body: GenerateBody) -> GenerateCompletion:
    """What it asks for. Raises InvalidRequestError."""
    asked, where = body.sampling_params, "sampling_params"
    for name in _REFUSED:
        refuse(f"{where}.{name}", bool(getattr(asked, name)) or (getattr(asked, name) == 0 and "logprob" in name))
    for name in ("features", "content_parts"):
        refuse(name, bool(getattr(body, name)))
    require(body.output_mode in (None, *MODES), "output_mode", "is tokens or text")
    detokenized = asked.detokenize is not False
    require(detokenized or not asked.stop, f"{where}.stop", "needs detokenize to be true")
    require(detokenized or body.output_mode != "text", "output_mode", f"text needs {where}.detokenize to be true")
    refuse("reasoning_ended", body.reasoning_ended is False and asked.structured_outputs is not None)
    given = {name: getattr(asked, name) for name in asked.__struct_fields__ if name in _OBEYED}
    defaults = {name: value for name, value in _DEFAULTS.items() if given[name] is None}
    return GenerateCompletion(
        model=body.model,
        prompt=list(body.token_ids),
        request_id=body.request_id,
        return_token_ids=True,
        stream=body.stream,
        stream_options=body.stream_options,
        cache_salt=body.cache_salt,
        priority=body.priority,
        vllm_xargs=asked.extra_args,
        **(given | defaults),
    )


def name_here(field: str) -> str:
    """What this API calls a field of that completion."""
    if field == "prompt":
        return "token_ids"
    whole = {"vllm_xargs": "extra_args"}.get(field, field)
    return f"sampling_params.{whole}" if whole.partition(".")[0] in GenerateSampling.__struct_fields__ else field


_OBEYED = set(GenerateSampling.__struct_fields__) & set(CompletionRequest.__struct_fields__)
_DEFAULTS: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
