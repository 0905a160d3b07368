"""What clients may send to the OpenAI endpoints, and its translation into the router's own words (`requests.spec`).

Owns the names of the fields that are obeyed, the checks of each and their messages. A field that is not obeyed is in
`other_fields`, or refused as unknown: nothing that would change the answer is ignored.
"""

import random
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec

from nodeapi.messages import SamplingParams
from router.api.cache_hints import CacheHintFields, hints_of, session_of
from router.api.chat_messages import ChatMessage, marks_of, message_of, template_values
from router.api.chat_tools import Tool, tools_of
from router.api.checks import TokenLists, number, refuse, repetition_penalty, require, token_ids, top_k, top_p
from router.api.limits import ApiLimits
from router.api.tool_choice import may_call, reading_of
from router.api.truncation import truncated
from router.parsing.dialects import Dialect
from router.requests.spec import (
    AnswerReading,
    AnswerRequest,
    ChatPrompt,
    FieldNames,
    Prompt,
    RequestSpec,
    ShownFields,
    TextOptions,
    TextPrompt,
    TokenPrompt,
    Turn,
)
from router.text.model_habits import ModelHabits, SamplingDefaults

DEFAULT_COMPLETION_TOKENS = 16
_INT64 = 1 << 63
_ANY_CONTEXT = 1 << 31


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_usage`: one more chunk at the end, with usage and no choices. `continuous_usage_stats`, beside it: the
    usage so far in every chunk. `include_obfuscation` is harmless: nothing is padded."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = False


class _CommonFields(CacheHintFields, frozen=True, kw_only=True):
    """The fields of both endpoints."""

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
    cache_salt: str | None = None
    user: object = None
    """Without keys, who shares fairly with others while requests must wait."""
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    spaces_between_special_tokens: bool | None = True


class ChatRequest(_CommonFields, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, object] | None = None
    documents: list[dict[str, object]] | None = None
    reasoning_effort: str | None = None
    add_special_tokens: bool | None = False
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = True
    include_reasoning: bool | None = True
    response_format: dict[str, object] | None = None


class CompletionRequest(_CommonFields, frozen=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = True
    response_format: dict[str, object] | None = None


AnyRequest = ChatRequest | CompletionRequest


def prompts_of(request: AnyRequest, limits: ApiLimits) -> list[Prompt]:
    """A chat's messages, or the prompts of a completion; what changes the answer and is not supported is refused."""
    if isinstance(request, ChatRequest):
        _check_response_format(request.response_format)
        return [_chat_prompt(request, limits)]
    return _prompts(request, limits)


def answer_request(
    request: AnyRequest,
    prompts: Sequence[list[int]],
    *,
    max_context: int | None,
    habits: ModelHabits = ModelHabits(),
    request_id: str,
    client_request_id: str,
    limits: ApiLimits,
) -> AnswerRequest:
    """All of `request` but its prompts, which are tokens by now: a spec for each, all fields checked.

    `max_context` None: not known as no node is up; a wrong request is wrong at any time, so the fields are checked all
    the same. Raises InvalidRequestError.
    """
    stops, salt, reading = _stops(request, limits), _cache_salt(request, limits), _reading(request, habits.dialect)
    hints = hints_of(request, marks_of(request.messages) if isinstance(request, ChatRequest) else ())
    context = _ANY_CONTEXT if max_context is None else max_context
    room = context - _max_tokens(request, 0, DEFAULT_COMPLETION_TOKENS, None)[0]
    lists = TokenLists(request.logit_bias, request.stop_token_ids, limits.max_biases)
    flow = request.user[: limits.max_user_chars] if isinstance(request.user, str) else ""
    specs = [
        RequestSpec(
            request_id=request_id if number == 0 else f"{request_id}-{number}",
            prompt_token_ids=prompt,
            sampling=_sampling(request, len(prompt), context, limits, lists=lists, defaults=habits.sampling),
            cache_salt=salt,
            client_request_id=client_request_id,
            hints=hints,
            session=session_of(request),
            flow=flow,
        )
        for number, whole in enumerate(prompts)
        for prompt in [truncated(whole, request.truncate_prompt_tokens, request.truncation_side, room)]
    ]
    return AnswerRequest(
        specs,
        stops=stops,
        text=_text_options(request, reading),
        shown=_shown(request),
        names=FieldNames(prompt="messages" if isinstance(request, ChatRequest) else "prompt"),
        turn=Turn(flow),
        reading=reading,
        token_prompts=isinstance(request, CompletionRequest) and not _is_text(request.prompt),
    )


def _is_text(prompt: str | list[str | int | list[int]]) -> bool:
    return isinstance(prompt, str) or all(isinstance(one, str) for one in prompt)


def _reading(request: AnyRequest, dialect: Dialect | None) -> AnswerReading | None:
    if not isinstance(request, ChatRequest):
        return None
    tools = request.tools if may_call(request.tools, request.tool_choice) else None
    return reading_of(
        tools,
        dialect=dialect,
        shows_reasoning=request.include_reasoning is not False,
        one_call=request.parallel_tool_calls is False,
        continues=bool(request.continue_final_message),
    )


def _text_options(request: AnyRequest, reading: AnswerReading | None) -> TextOptions:
    marked = reading is not None and (reading.dialect.special or reading.tools is not None)
    return TextOptions(
        skip_special_tokens=request.skip_special_tokens is not False and not marked,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        include_stop=bool(request.include_stop_str_in_output),
    )


def _shown(request: AnyRequest) -> ShownFields:
    options = request.stream_options or StreamOptions()
    usage = bool(request.stream and options.include_usage)
    so_far = usage and bool(options.continuous_usage_stats)
    return ShownFields(
        token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        usage=usage,
        usage_so_far=so_far,
    )


def _stops(request: AnyRequest, limits: ApiLimits) -> list[str]:
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or ())
    require(len(stops) <= limits.max_stops, "stop", f"has at most {limits.max_stops} strings")
    longest = limits.max_stop_chars
    require(all(0 < len(stop) <= longest for stop in stops), "stop", f"has 1 to {longest} characters each")
    return stops


def _chat_prompt(request: ChatRequest, limits: ApiLimits) -> ChatPrompt:
    """The conversation for the template. Raises for all that is not text."""
    require(0 < len(request.messages) <= limits.max_messages, "messages", f"has 1 to {limits.max_messages} messages")
    parts = sum(len(message.content) for message in request.messages if isinstance(message.content, list))
    require(parts <= limits.max_messages, "messages", f"has at most {limits.max_messages} parts of content")
    continues = bool(request.continue_final_message)
    require(
        not (continues and request.add_generation_prompt),
        "continue_final_message",
        "and add_generation_prompt must not both be true",
    )
    asks = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    tools = tools_of(request.tools or ()) or None
    fields = {"add_generation_prompt": asks, "continue_final_message": continues, "tools": tools}
    values = template_values(request.chat_template_kwargs, fields)
    documents = _documents(values.pop("documents", None)) if request.documents is None else request.documents
    if request.reasoning_effort is not None:
        values["reasoning_effort"] = request.reasoning_effort
        values.setdefault("enable_thinking", request.reasoning_effort != "none")
    return ChatPrompt(
        [message_of(number, message) for number, message in enumerate(request.messages)],
        add_generation_prompt=asks,
        continue_final_message=continues,
        template_values=values,
        documents=documents,
        tools=tools,
        add_special_tokens=bool(request.add_special_tokens),
    )


def _documents(given: object) -> list[Mapping[str, object]] | None:
    documents = [item for item in given if isinstance(item, Mapping)] if isinstance(given, list) else None
    require(documents == given, "chat_template_kwargs.documents", "must be objects")
    return documents


def _prompts(request: CompletionRequest, limits: ApiLimits) -> list[Prompt]:
    _check_response_format(request.response_format)
    n = 1 if request.n is None else request.n
    refuse("best_of", request.best_of is not None and request.best_of != n)
    prompt, special_tokens = request.prompt, request.add_special_tokens is not False
    if isinstance(prompt, str):
        return [TextPrompt(prompt, special_tokens)]
    require(len(prompt) > 0, "prompt", "must not be empty")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [TokenPrompt(token_ids(cast(list[int], prompt)))]
    require(int not in kinds, "prompt", "mixes token ids with other prompts")
    require(len(prompt) <= limits.max_prompts, "prompt", f"has at most {limits.max_prompts} prompts")
    return [
        TextPrompt(item, special_tokens) if isinstance(item, str) else TokenPrompt(token_ids(item))
        for item in prompt
        if not isinstance(item, int)
    ]


def _cache_salt(request: AnyRequest, limits: ApiLimits) -> bytes:
    salt = request.cache_salt
    if salt is None:
        return b""
    require(0 < len(salt) <= limits.max_salt_chars, "cache_salt", f"has 1 to {limits.max_salt_chars} characters")
    return salt.encode()


def _sampling(
    request: AnyRequest,
    prompt_tokens: int,
    max_context: int,
    limits: ApiLimits,
    *,
    lists: TokenLists,
    defaults: SamplingDefaults,
) -> SamplingParams:
    """The engine's parameters, all checked; draws a seed where there is none.

    Without max_tokens a chat may fill the context and a completion has 16 tokens. Raises InvalidRequestError.
    """
    max_tokens, named = _max_tokens(request, prompt_tokens, max_context, defaults.max_new_tokens)
    min_tokens = request.min_tokens or 0
    require(0 <= min_tokens <= max_tokens, "min_tokens", f"must lie between 0 and {named} ({max_tokens})")
    n = 1 if request.n is None else request.n
    require(1 <= n <= limits.max_n, "n", f"must lie between 1 and {limits.max_n}")
    if request.stream_options is not None:
        require(bool(request.stream), "stream_options", "is only allowed when stream is true")
    seed = random.getrandbits(63) if request.seed is None else request.seed
    require(-_INT64 <= seed < _INT64, "seed", "must be a 64-bit integer")
    return SamplingParams(
        temperature=number(request.temperature, defaults.temperature, "temperature", 0.0, 2.0),
        top_p=top_p(request.top_p, defaults.top_p),
        top_k=top_k(request.top_k, defaults.top_k),
        min_p=number(request.min_p, defaults.min_p, "min_p", 0.0, 1.0),
        seed=seed % _INT64,
        presence_penalty=number(request.presence_penalty, defaults.presence_penalty, "presence_penalty", -2.0, 2.0),
        frequency_penalty=number(request.frequency_penalty, defaults.frequency_penalty, "frequency_penalty", -2.0, 2.0),
        repetition_penalty=repetition_penalty(request.repetition_penalty, defaults.repetition_penalty),
        logit_bias=lists.bias,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=lists.ends,
        ignore_eos=bool(request.ignore_eos),
        logprobs=_logprobs(request, limits.max_logprobs),
        n=n,
    )


def _max_tokens(request: AnyRequest, prompt_tokens: int, max_context: int, most: int | None) -> tuple[int, str]:
    named, given = "max_tokens", request.max_tokens
    if request.max_completion_tokens is not None:
        named, given = "max_completion_tokens", request.max_completion_tokens
    if given is None:
        room = max(1, max_context - prompt_tokens)
        most = (most or room) if isinstance(request, ChatRequest) else DEFAULT_COMPLETION_TOKENS
        return min(room, most), named
    require(given >= 1, named, "must be at least 1")
    return min(given, _INT64), named  # more is over any context, and may have too many digits to be printed


def _logprobs(request: AnyRequest, most: int) -> int | None:
    if isinstance(request, CompletionRequest):
        if request.logprobs is not None:
            require(0 <= request.logprobs <= most, "logprobs", f"must lie between 0 and {most}")
        return request.logprobs
    if request.top_logprobs is not None:
        require(bool(request.logprobs) or request.top_logprobs == 0, "top_logprobs", "needs logprobs to be true")
        require(0 <= request.top_logprobs <= most, "top_logprobs", f"must lie between 0 and {most}")
    return (request.top_logprobs or 0) if request.logprobs else None


def _check_response_format(value: dict[str, object] | None) -> None:
    refuse("response_format", value is not None and value != {"type": "text"})
