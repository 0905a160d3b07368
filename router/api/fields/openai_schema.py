"""From a checked body of the OpenAI endpoints to the router's own words (`requests.spec`).

The names of the fields that are obeyed are in the modules beside this one. A field that is not obeyed is in
`other_fields`, or refused as unknown: nothing that would change the answer is ignored.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from kvcore.chunk_keys import ADAPTER_SALT
from nodeapi.grammars.grammar import Grammar
from router.api.fields.batch_fields import chat_prompts, chats_of
from router.api.fields.cache_hints import MarkedForCache, hints_of, session_of
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.chat_messages import marks_of
from router.api.fields.checks import INT64, require
from router.api.fields.common_fields import RepetitionDetection
from router.api.fields.completion_fields import CompletionRequest, completion_prompts
from router.api.fields.sampling_fields import DEFAULT_COMPLETION_TOKENS, max_tokens_of, sampling_of
from router.api.fields.score_fields import AnyRequest, check_size, scoring_of
from router.api.fields.structured import AskedGrammar, asked_grammar
from router.api.fields.tool_choice import must_call, reading_of, tool_grammar
from router.api.fields.truncation import truncated
from router.api.limits import ApiLimits
from router.documents.named import NamedDocuments
from router.parsing.dialects import Dialect
from router.requests.spec import (
    AnswerReading,
    AnswerRequest,
    FieldNames,
    Prompt,
    RequestSpec,
    Scoring,
    ShownFields,
    TextOptions,
    Turn,
)
from router.text.model_habits import ModelHabits
from router.text.reasoning_marks import ReasoningMarks
from router.text.repetition import Repetition

_ANY_CONTEXT = 1 << 31
_CUT = "the prompt was cut, by truncate_prompt_tokens"
_NAMES = {"bad_words_token_ids": "bad_words", "extra_args": "vllm_xargs"}


def prompts_of(request: AnyRequest, limits: ApiLimits) -> list[Prompt]:
    """The messages of each chat, or the prompts of a completion; what changes the answer and is not supported is
    refused."""
    if isinstance(request, ChatRequest):
        return chat_prompts(request, limits)
    return completion_prompts(request, limits)


def answer_request(
    request: AnyRequest,
    prompts: Sequence[list[int]],
    *,
    max_context: int | None,
    habits: ModelHabits = ModelHabits(),
    request_id: str,
    client_request_id: str,
    limits: ApiLimits,
    prompt_name: str | None = None,
    form: AskedGrammar | None = None,
    bad_words: list[list[int]] | None = None,
    prompt_text: str | None = None,
    documents: Sequence[NamedDocuments | None] = (),
) -> AnswerRequest:
    """All of `request` but its prompts, which are tokens by now: a spec for each, all fields checked. `form`: its
    `grammar_asked_by`, which was checked.

    `max_context` None: not known as no node is up; a wrong request is wrong at any time, so the fields are checked all
    the same. `prompt_name`: what the client calls its prompt; None: as the endpoint does. `bad_words`: their tokens.
    `prompt_text`: that the client wants to see. `documents`: each prompt's; empty: none. Raises InvalidRequestError.
    """
    stops, salt, reading = _stops(request, limits), _cache_salt(request, limits), _reading(request, habits.dialect)
    hints = hints_of(request, _marks(request))
    context = max_context or _ANY_CONTEXT
    longest, named = max_tokens_of(request, 0, DEFAULT_COMPLETION_TOKENS, None)
    room = context - longest
    flow, session = flow_of(request, limits), session_of(request)
    specs: list[RequestSpec] = []
    client_id = _client_id(request_id, request.request_id, limits)
    for number, (whole, said) in enumerate(zip_longest(prompts, documents)):
        prompt = truncated(whole, request.truncate_prompt_tokens, request.truncation_side, room, context)
        sampling = sampling_of(
            request,
            len(prompt),
            context,
            limits,
            bad_words=bad_words or [],
            defaults=habits.sampling,
            grammar=None if form is None else _grammar(request, form, prompt, habits.marks),
            first=specs[0].sampling if specs else None,
        )
        specs.append(
            RequestSpec(
                request_id=request_id if number == 0 else f"{request_id}-{number}",
                prompt_token_ids=prompt,
                sampling=sampling,
                cache_salt=salt,
                client_request_id=client_request_id,
                answer_id=client_id or None,
                hints=hints,
                session=session,
                flow=flow,
                documents=said if said is None or prompt == whole else replace(said, spans=(), why=_CUT),
            )
        )
    check_size(specs, limits)
    scoring = scoring_of(request)
    return AnswerRequest(
        specs,
        stops=() if scoring.prompt_alone else stops,
        text=_text_options(request, reading),
        shown=_shown(request, prompt_text, scoring),
        names=_field_names(request, prompt_name, form, named),
        turn=Turn(flow, priority=_priority(request.priority)),
        client_id=client_id,
        repetition=_repetition(request.repetition_detection, limits),
        reading=reading,
        token_prompts=isinstance(request, CompletionRequest) and not _is_text(request.prompt),
    )


def grammar_asked_by(request: AnyRequest, dialect: Dialect | None) -> AskedGrammar | None:
    """The form that the answer must have, still to be checked: calls that must be made, in the model's `dialect`, come
    before any other. None: any. Raises InvalidRequestError."""
    form = asked_grammar(request.response_format, request.structured_outputs)
    if not isinstance(request, ChatRequest) or (form is not None and not must_call(request.tool_choice)):
        return form
    one_call = request.parallel_tool_calls is False
    return tool_grammar(request.tools, request.tool_choice, dialect=dialect, one_call=one_call) or form


def _grammar(request: AnyRequest, form: AskedGrammar, prompt: Sequence[int], marks: ReasoningMarks | None) -> Grammar:
    """That of one prompt: a chat's answer may reason first."""
    if form.whole or marks is None or not isinstance(request, ChatRequest):
        return form.grammar
    return marks.place(form.grammar, prompt, continues=bool(request.continue_final_message))


def flow_of(request: AnyRequest, limits: ApiLimits) -> str:
    """By what its turns are taken where no keys are configured."""
    return (request.user or "")[: limits.max_user_chars]


def _marks(request: AnyRequest) -> list[MarkedForCache]:
    if not isinstance(request, ChatRequest):
        return []
    return [mark for chat in chats_of(request) for mark in marks_of(chat.messages)]


def _field_names(request: AnyRequest, prompt: str | None, form: AskedGrammar | None, max_tokens: str) -> FieldNames:
    asks_length = request.max_tokens is not None or request.max_completion_tokens is not None
    return FieldNames(
        prompt=prompt or ("messages" if isinstance(request, ChatRequest) else "prompt"),
        others=_NAMES if form is None else {**_NAMES, "grammar": form.field},
        max_tokens=max_tokens if asks_length else None,
    )


def _is_text(prompt: str | list[str | int | list[int]]) -> bool:
    return isinstance(prompt, str) or all(isinstance(one, str) for one in prompt)


def _reading(request: AnyRequest, dialect: Dialect | None) -> AnswerReading | None:
    if not isinstance(request, ChatRequest):
        return None
    return reading_of(
        request.tools,
        request.tool_choice,
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


def _priority(value: int | None) -> int:
    if not value:
        return 0
    require(-INT64 <= value < INT64, "priority", "must be a 64-bit integer")
    return value


def bad_words_of(request: AnyRequest, limits: ApiLimits) -> list[str]:
    """The words that are to be made tokens."""
    if not request.bad_words:
        return []
    words, longest = request.bad_words, limits.max_bad_word_chars
    require(len(words) <= limits.max_bad_words, "bad_words", f"has at most {limits.max_bad_words} words")
    require(sum(map(len, words)) <= longest, "bad_words", f"has at most {longest} characters in all")
    return words


def _client_id(request_id: str, value: str | None, limits: ApiLimits) -> str:
    """With the endpoint's prefix, which `request_id` has."""
    if value is None:
        return ""
    longest = limits.max_request_id_chars
    good = 0 < len(value) <= longest and value.isprintable()
    require(good, "request_id", f"has 1 to {longest} printable characters")
    return f"{request_id[: request_id.rfind('-') + 1]}{value}"


def _repetition(asked: RepetitionDetection | None, limits: ApiLimits) -> Repetition | None:
    if asked is None:
        return None
    least, most, count = asked.min_pattern_size, asked.max_pattern_size, asked.min_count
    where, largest = "repetition_detection", limits.max_pattern_size
    require(0 <= least <= most <= largest, where, f"has 0 <= min_pattern_size <= max_pattern_size <= {largest}")
    require(most == 0 or 2 <= count < INT64, where, "needs a min_count of at least 2")
    return Repetition(max(1, least), most, count) if most else None


def _shown(request: AnyRequest, prompt_text: str | None, scoring: Scoring) -> ShownFields:
    options = request.stream_options
    usage = bool(request.stream and options is not None and options.include_usage)
    so_far = usage and options is not None and bool(options.continuous_usage_stats)
    interval = 1 if request.stream_interval is None else request.stream_interval
    require(interval >= 1, "stream_interval", "must be at least 1")
    return ShownFields(
        token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        usage=usage,
        usage_so_far=so_far,
        stream_interval=interval if request.stream else 1,
        prompt_text=prompt_text,
        scoring=scoring,
    )


def _stops(request: AnyRequest, limits: ApiLimits) -> list[str]:
    if request.stop is None:
        return []
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop)
    require(len(stops) <= limits.max_stops, "stop", f"has at most {limits.max_stops} strings")
    longest = limits.max_stop_chars
    require(all(0 < len(stop) <= longest for stop in stops), "stop", f"has 1 to {longest} characters each")
    return stops


def _cache_salt(request: AnyRequest, limits: ApiLimits) -> bytes:
    salt = request.cache_salt
    if salt is None:
        return b""
    require(0 < len(salt) <= limits.max_salt_chars, "cache_salt", f"has 1 to {limits.max_salt_chars} characters")
    begins = ADAPTER_SALT.decode()
    require(not salt.startswith(begins), "cache_salt", f"must not begin with {begins!r}: so do adapters' own salts")
    return salt.encode()
