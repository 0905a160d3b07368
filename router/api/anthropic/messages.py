"""What clients may send to /v1/messages, and the chat that it is.

Source: https://docs.anthropic.com/en/api/messages; the translation is that of vLLM's server.
"""

import json
from collections.abc import Sequence

import msgspec

from router.api.fields.chat_fields import ChatRequest, Effort
from router.api.fields.chat_messages import ChatMessage, ContentPart
from router.api.fields.chat_tools import FunctionSpec, Tool
from router.api.fields.checks import refuse, require


class ResultBlock(msgspec.Struct, frozen=True):
    """A block of what a tool has answered: text."""

    type: str
    text: str | None = None


class ContentBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block of a turn. Images and documents are refused; `signature` and `caller` come back from answers, and are
    harmless; `cache_control` is a hint."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: object = None
    data: object = None
    id: str | None = None
    name: str | None = None
    input: dict[str, object] | None = None
    tool_use_id: str | None = None
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None
    cache_control: object = None
    caller: object = None
    citations: object = None
    source: object = None


class MessageTurn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of the conversation."""

    role: str
    content: str | list[ContentBlock]


class ToolSpec(msgspec.Struct, frozen=True):
    """A tool of the client's. Anthropic's own tools have a `type` with a date, and are refused."""

    name: str
    description: str | None = None
    input_schema: dict[str, object] | None = None
    strict: bool | None = None
    type: str | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether, and which, tools are called."""

    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = False


class OutputFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The form of the answer: a JSON schema."""

    type: str
    schema: dict[str, object] | None = None


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the answer is to be."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class MessagesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/messages; without `max_tokens` of /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[MessageTurn]
    max_tokens: int | None = None
    system: str | list[ContentBlock] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, object] | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, object] | None = None
    cache_salt: str | None = None


def chat_of(request: MessagesRequest, *, counted_only: bool = False) -> ChatRequest:
    """The chat that it asks for. `counted_only`: nothing is to be answered. Raises InvalidRequestError."""
    require(counted_only or request.max_tokens is not None, "max_tokens", "is missing")
    values = dict(request.chat_template_kwargs or {})
    if request.thinking is not None:
        values.setdefault("enable_thinking", request.thinking.get("type") != "disabled")
    choice, parallel = _choice(request.tool_choice)
    output = request.output_config or OutputConfig()
    return ChatRequest(
        model=request.model,
        messages=_messages(request),
        max_tokens=request.max_tokens,
        stop=request.stop_sequences,
        stream=request.stream,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        tools=[_tool(number, tool) for number, tool in enumerate(request.tools or ())] or None,
        tool_choice="none" if counted_only else choice,
        parallel_tool_calls=parallel,
        response_format=_response_format(output.format),
        reasoning_effort=output.effort,
        chat_template_kwargs=values or None,
        cache_salt=request.cache_salt,
    )


def their_name(field: str) -> str:
    """What this API calls a field of that chat."""
    if field.partition(".")[0] == "response_format":
        return "output_config.format"
    return "stop_sequences" if field == "stop" else field


def _response_format(form: OutputFormat | None) -> dict[str, object] | None:
    if form is None:
        return None
    require(form.type == "json_schema", "output_config.format.type", "is json_schema")
    require(form.schema is not None, "output_config.format.schema", "is missing")
    return {"type": "json_schema", "json_schema": {"name": form.type, "schema": form.schema}}


def _choice(choice: ToolChoice | None) -> tuple[str | dict[str, object] | None, bool]:
    if choice is None:
        return None, True
    require(choice.type in ("auto", "any", "tool", "none"), "tool_choice.type", "is auto, any, tool or none")
    names: dict[str, str | dict[str, object]] = {
        "any": "required",
        "tool": {"type": "function", "function": {"name": choice.name}},
    }
    return names.get(choice.type, choice.type), not choice.disable_parallel_tool_use


def _tool(number: int, tool: ToolSpec) -> Tool:
    refuse(f"tools[{number}].type", tool.type not in (None, "custom"))
    parameters = {"type": "object", **(tool.input_schema or {})}
    return Tool(FunctionSpec(tool.name, tool.description, parameters, tool.strict))


def _messages(request: MessagesRequest) -> list[ChatMessage]:
    system = request.system
    messages = []
    if system:
        text = system if isinstance(system, str) else "".join(_text("system", block) for block in system)
        messages.append(ChatMessage("system", text))
    for number, turn in enumerate(request.messages):
        where = f"messages[{number}]"
        require(turn.role in ("user", "assistant", "system"), f"{where}.role", "is user, assistant or system")
        if isinstance(turn.content, str):
            messages.append(ChatMessage(turn.role, turn.content))
        elif turn.role == "assistant":
            messages.append(_assistant(where, turn.content))
        else:
            messages += _user(where, turn.role, turn.content)
    return messages


def _assistant(where: str, blocks: Sequence[ContentBlock]) -> ChatMessage:
    calls: list[dict[str, object]] = []
    thoughts: list[str] = []
    parts: list[str | ContentPart] = []
    for block in blocks:
        if block.type == "tool_use":
            function = {"name": block.name or "", "arguments": json.dumps(block.input or {})}
            calls.append({"id": block.id or "", "type": "function", "function": function})
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":  # nobody here can read it
            parts.append(_part(where, block))
    content = _joined(parts) if parts else None
    return ChatMessage("assistant", content, reasoning="".join(thoughts) or None, tool_calls=calls or None)


def _user(where: str, role: str, blocks: Sequence[ContentBlock]) -> list[ChatMessage]:
    """Results of tools are messages of their own, before what the user says."""
    results = []
    for block in (block for block in blocks if block.type == "tool_result"):
        given = block.content
        text = given if isinstance(given, str) else "\n".join(_text(where, inner) for inner in given or ())
        results.append(ChatMessage("tool", text, tool_call_id=block.tool_use_id or ""))
    parts: list[str | ContentPart] = [_part(where, block) for block in blocks if block.type != "tool_result"]
    return [*results, ChatMessage(role, _joined(parts))] if parts or not results else results


def _joined(parts: list[str | ContentPart]) -> str | list[str | ContentPart]:
    if len(parts) == 1 and isinstance(parts[0], ContentPart) and parts[0].cache_control is None:
        return parts[0].text or ""
    return parts


def _part(where: str, block: ContentBlock) -> ContentPart:
    return ContentPart("text", _text(where, block), cache_control=block.cache_control)


def _text(where: str, block: ContentBlock | ResultBlock) -> str:
    require(block.type == "text", f"{where}.content", f"has a block of type {block.type!r}, which is not supported")
    require(block.text is not None, f"{where}.content", "has a text block without text")
    return block.text or ""
