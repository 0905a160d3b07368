"""What clients may send of a conversation, and what of it the chat template sees.

Owns the fields that make a chat's prompt, their checks and their messages.
"""

from collections.abc import Mapping

import msgspec

from router.api.checks import refuse, require

_OWN_NAMES = frozenset(
    ("add_generation_prompt", "chat_template", "continue_final_message", "documents", "messages", "tokenize", "tools")
)
"""What `chat_template_kwargs` may not hold: these are fields of the request, or none of the client's business."""


class ContentPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message; only type `text` is supported. What caches are told is harmless: ours needs no hints."""

    type: str
    text: str | None = None
    cache_control: object = None
    prompt_cache_breakpoint: object = None
    file: object = None
    image_url: object = None
    input_audio: object = None
    refusal: object = None
    uuid: object = None
    video_url: object = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. Clients send answers back as they got them, empty fields included; `annotations` are about web pages
    that an answer cites, and as `cache_control` harmless."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[object] | None = None
    tool_call_id: str | None = None
    annotations: object = None
    audio: object = None
    cache_control: object = None
    function_call: object = None
    refusal: str | None = None
    task: str | None = None
    tools: list[object] | None = None


def template_values(given: Mapping[str, object] | None) -> dict[str, object]:
    """What `chat_template_kwargs` gives the template, in a dict of the caller's own."""
    values = dict(given or {})
    for name in sorted(_OWN_NAMES & values.keys()):
        require(False, f"chat_template_kwargs.{name}", "is not the template's to be given")
    return values


def message_of(number: int, message: ChatMessage) -> Mapping[str, object]:
    """What the template sees of the message at `number`. Raises for all that is not text."""
    where = f"messages[{number}]"
    require(bool(message.role), f"{where}.role", "must not be empty")
    require(message.role not in ("tool", "function"), f"{where}.role", "is not supported: tools are not")
    for name in ("tool_calls", "tool_call_id", "tools", "function_call", "audio", "refusal", "task"):
        refuse(f"{where}.{name}", bool(getattr(message, name)))
    require(message.content is not None, f"{where}.content", "is missing")
    seen: dict[str, object] = {"role": message.role, "content": message.content}
    if isinstance(message.content, list):
        seen["content"] = [_part(f"{where}.content", part) for part in message.content]
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None and message.role == "assistant":
        seen["reasoning_content"] = reasoning
    if message.name is not None:
        seen["name"] = message.name
    return seen


def _part(where: str, part: ContentPart) -> dict[str, str]:
    require(part.type == "text", where, f"parts of type {part.type!r} are not supported, only text")
    require(part.text is not None, where, "parts of type text need a text")
    for name in ("file", "image_url", "input_audio", "refusal", "uuid", "video_url"):
        refuse(f"{where}.{name}", getattr(part, name) is not None)
    return {"type": "text", "text": part.text or ""}
