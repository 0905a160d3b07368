"""The fields that chats and completions have in common."""

from typing import ClassVar

import msgspec

from router.api.fields.cache_hints import CacheHintFields
from router.api.fields.structured import StructuredOutputs


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_usage`: one more chunk at the end, with usage and no choices. `continuous_usage_stats`, beside it: the
    usage so far in every chunk. `include_obfuscation` is harmless: nothing is padded."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = False


class RepetitionDetection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ends an answer that repeats itself: a pattern of so many tokens, so many times in a row. 0: nothing does."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class CommonFields(CacheHintFields, frozen=True, kw_only=True):
    """The fields of both endpoints. `fills_context`: without `max_tokens` an answer may fill the context."""

    fills_context: ClassVar[bool] = False

    model: str | None = None
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    repetition_detection: RepetitionDetection | None = None
    thinking_token_budget: int | None = None
    vllm_xargs: dict[str, str | int | float | list[str | int | float]] | None = None
    """For what was plugged into vLLM engines."""
    priority: int | None = 0
    """Among the requests of the same tenant, or `user`: lower is sooner."""
    request_id: str | None = None
    """The answer's id, after the endpoint's prefix."""
    stream_interval: int | None = None
    """Tokens of one chunk; the first and the last one come at once."""
    cache_salt: str | None = None
    user: str | None = None
    """Without keys, who shares fairly with others while requests must wait."""
    echo: bool | None = False
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True
    response_format: dict[str, object] | None = None
    structured_outputs: StructuredOutputs | None = None
