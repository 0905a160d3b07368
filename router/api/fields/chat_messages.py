"""What clients may send of a conversation, and what of it the chat template sees.

Owns the fields that make a chat's prompt, their checks and their messages.
"""

from collections.abc import Iterable, Mapping

import msgspec

from router.api.fields.cache_hints import MarkedForCache
from router.api.fields.chat_tools import call_of
from router.api.fields.checks import refuse, require

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
"""Types of parts that are text, and the field that it stands in."""


class ContentPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message, which must be text. `document`: it is one (`router.documents`). What caches are told are
    hints (`router.api.fields.cache_hints`)."""

    type: str
    text: str | None = None
    refusal: str | None = None
    thinking: str | None = None
    cache_control: object = None
    closed: object = None
    document: bool | None = None
    prompt_cache_breakpoint: object = None
    file: object = None
    image_url: object = None
    input_audio: object = None
    uuid: object = None
    video_url: object = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. Clients send answers back as they got them, empty fields included; `annotations` are about web pages
    that an answer cites, and harmless, as is what layers between client and server add to answers of their own and send
    back (LiteLLM, OpenRouter); `cache_control` is a hint."""

    role: str
    content: str | list[str | ContentPart] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, object]] | None = None
    tool_call_id: str | None = None
    annotations: object = None
    audio: object = None
    cache_control: object = None
    function_call: object = None
    refusal: str | None = None
    task: str | None = None
    tools: list[dict[str, object]] | None = None
    provider_specific_fields: object = None
    reasoning_details: object = None
    reasoning_items: object = None
    thinking_blocks: object = None


def message_of(number: int, message: ChatMessage) -> Mapping[str, object]:
    """What the template sees of the message at `number`, its keys in vLLM's order. Raises for all that is not text."""
    where, is_assistant = f"messages[{number}]", message.role == "assistant"
    require(bool(message.role), f"{where}.role", "must not be empty")
    if message.function_call or message.audio or message.refusal:
        for name in ("function_call", "audio", "refusal"):
            refuse(f"{where}.{name}", bool(getattr(message, name)))
    require(message.content is not None or is_assistant, f"{where}.content", "is missing")
    seen: dict[str, object] = {"role": message.role, "content": message.content}
    if isinstance(message.content, list):
        seen["content"] = [_part(f"{where}.content", part) for part in message.content]
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if is_assistant:
        calls = message.tool_calls or []
        if calls:
            seen["tool_calls"] = [call_of(f"{where}.tool_calls[{at}]", call) for at, call in enumerate(calls)]
        if reasoning is not None:
            seen |= {"reasoning": reasoning, "reasoning_content": reasoning}
    else:
        refuse(f"{where}.tool_calls", bool(message.tool_calls))
    refuse(f"{where}.tools", bool(message.tools) and message.role != "developer")
    given = {
        "tool_call_id": message.tool_call_id if message.role == "tool" else None,
        "name": message.name,
        "task": message.task,
        "tools": message.tools if message.role == "developer" else None,
    }
    return seen | {name: value for name, value in given.items() if value is not None}


def marks_of(messages: Iterable[ChatMessage]) -> list[MarkedForCache]:
    """What those of them and of their parts ask of the cache that ask anything."""
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    marks = [MarkedForCache(message.cache_control) for message in messages if message.cache_control is not None]
    marks += [
        MarkedForCache(part.cache_control, part.prompt_cache_breakpoint)
        for part in parts
        if isinstance(part, ContentPart) and not (part.cache_control is part.prompt_cache_breakpoint is None)
    ]
    return marks


def template_values(given: Mapping[str, object] | None, fields: Mapping[str, object]) -> dict[str, object]:
    """What `chat_template_kwargs` gives the template, in a dict of the caller's own. `fields`: those of the request
    that the template is given under their own names; what says the same again is harmless."""
    values = dict(given or {})
    for name in ("chat_template", "messages", "tokenize"):
        require(name not in values, f"chat_template_kwargs.{name}", "is not the template's to be given")
    for name in fields.keys() & values.keys():
        same = values.pop(name) == fields[name]
        require(same, f"chat_template_kwargs.{name}", f"is a field of the request: give {name} there")
    return values


def _part(where: str, part: str | ContentPart) -> dict[str, object]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    require(part.type in _TEXTS, where, f"parts of type {part.type!r} are not supported, only text")
    for name in ("file", "image_url", "input_audio", "uuid", "video_url"):
        refuse(f"{where}.{name}", getattr(part, name) is not None)
    text: str | None = getattr(part, _TEXTS[part.type])
    require(text is not None, where, f"parts of type {part.type} need a {_TEXTS[part.type]}")
    seen: dict[str, object] = {"type": "text", "text": text or ""}
    return {**seen, "document": True} if part.document else seen
