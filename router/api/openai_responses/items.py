"""The items that a conversation of /v1/responses is made of, and the messages of a chat that they are.

Source: https://platform.openai.com/docs/api-reference/responses; the translation is that of vLLM's server.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from router.api.fields.chat_messages import ChatMessage, ContentPart
from router.api.fields.checks import refuse, require

_TEXTS = ("input_text", "output_text", "reasoning_text", "summary_text", "text")


class InputPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of an item's content: text. Images and files are refused; `annotations` and `logprobs` come back from
    answers, and are harmless."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: object = None
    logprobs: object = None
    prompt_cache_breakpoint: object = None
    detail: object = None
    file_data: object = None
    file_id: object = None
    file_url: object = None
    filename: object = None
    image_url: object = None
    input_audio: object = None


class InputItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A message, a call of a function, what came of one, or reasoning; all else is refused by its `type`. Clients send
    items back as they got them: what of an item no prompt depends on is harmless."""

    type: str | None = None
    role: str | None = None
    content: str | list[InputPart] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    encrypted_content: object = None
    namespace: object = None
    caller: object = None
    created_by: object = None
    phase: object = None
    waits: object = msgspec.field(default=None, name="async")


@dataclass(slots=True)
class _Draft:
    """A message that the next items may add to."""

    role: str
    content: str | list[str | ContentPart] | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, object]] = field(default_factory=list)
    tool_call_id: str | None = None

    def message(self) -> ChatMessage:
        return ChatMessage(
            self.role,
            self.content,
            reasoning=self.reasoning,
            tool_calls=self.tool_calls or None,
            tool_call_id=self.tool_call_id,
        )


def user_item(text: str) -> InputItem:
    """What an `input` of text is short for."""
    return InputItem("message", "user", text)


def messages_of(items: Sequence[InputItem], before: int = 0) -> list[ChatMessage]:
    """What an assistant has thought, said and called is one message as far as it comes in one row. `before`: so many
    of the items are of earlier answers, and are not counted where one is named. Raises InvalidRequestError."""
    drafts: list[_Draft] = []
    for number, item in enumerate(items, start=-before):
        _add(f"input[{number}]", item, drafts)
    return [draft.message() for draft in drafts]


def continues(items: Sequence[InputItem]) -> bool:
    """Whether the answer goes on with the last item, which was cut off."""
    if not items or items[-1].type not in (None, "message", "reasoning"):
        return False
    return items[-1].status in ("in_progress", "incomplete") and items[-1].role in (None, "assistant")


def _add(where: str, item: InputItem, drafts: list[_Draft]) -> None:
    last = drafts[-1] if drafts and drafts[-1].role == "assistant" else None
    match item.type or "message":
        case "function_call":
            function = {"name": item.name or "", "arguments": item.arguments or ""}
            require(bool(item.name), f"{where}.name", "is missing")
            require(bool(item.call_id), f"{where}.call_id", "is missing")
            refuse(f"{where}.namespace", item.namespace is not None)
            last = last or _begun(drafts, "assistant")
            last.tool_calls.append({"id": item.call_id, "type": "function", "function": function})
        case "function_call_output":
            require(item.output is not None, f"{where}.output", "is missing")
            made = _begun(drafts, "tool")
            made.content, made.tool_call_id = _content(f"{where}.output", item.output), item.call_id or ""
        case "reasoning":
            refuse(f"{where}.encrypted_content", bool(item.encrypted_content))
            thought = _joined(f"{where}.content", item.content) or _joined(f"{where}.summary", item.summary)
            if last is None or last.reasoning is not None:
                last = _begun(drafts, "assistant")
            last.reasoning = thought
        case "message":
            require(bool(item.role), f"{where}.role", "is missing")
            require(item.content is not None, f"{where}.content", "is missing")
            content = _content(f"{where}.content", item.content)
            if item.role != "assistant" or last is None or last.content is not None:
                last = _begun(drafts, item.role or "")
            last.content = content
        case other:
            require(False, f"{where}.type", f"{other!r} is not supported by this server")


def _begun(drafts: list[_Draft], role: str) -> _Draft:
    drafts.append(_Draft(role))
    return drafts[-1]


def _content(where: str, given: str | list[InputPart] | None) -> str | list[str | ContentPart]:
    """One part is as good as its text."""
    if given is None or isinstance(given, str):
        return given or ""
    texts = [_text(where, part) for part in given]
    if len(texts) == 1 and given[0].prompt_cache_breakpoint is None:
        return texts[0]
    return [
        ContentPart("text", text, prompt_cache_breakpoint=part.prompt_cache_breakpoint)
        for part, text in zip(given, texts, strict=True)
    ]


def _joined(where: str, given: str | list[InputPart] | None) -> str:
    return given if isinstance(given, str) else "".join(_text(where, part) for part in given or ())


def _text(where: str, part: InputPart) -> str:
    text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXTS else None
    require(text is not None, where, f"has a part of type {part.type!r} without text; only text is supported")
    return text or ""
