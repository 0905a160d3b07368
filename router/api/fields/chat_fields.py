"""The body of a chat, and what its prompt is made of."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from router.api.fields.chat_messages import ChatMessage, message_of, template_values
from router.api.fields.chat_tools import Tool, tools_of
from router.api.fields.checks import require
from router.api.fields.common_fields import CommonFields
from router.api.limits import ApiLimits
from router.requests.spec import ChatPrompt

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatFields(CommonFields, frozen=True, kw_only=True):
    """All of a chat's but its messages."""

    fills_context: ClassVar[bool] = True

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, object] | None = None
    documents: list[str | dict[str, object]] | None = None
    reasoning_effort: Effort | None = None
    add_special_tokens: bool | None = False
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = True
    include_reasoning: bool | None = True
    return_prompt_text: bool | None = False


class ChatRequest(ChatFields, frozen=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]


def begins_message(request: ChatRequest) -> bool:
    """Whether the prompt ends with what begins a message of the assistant's."""
    if request.add_generation_prompt is None:
        return not request.continue_final_message
    return request.add_generation_prompt


def chat_prompt(request: ChatRequest, limits: ApiLimits) -> ChatPrompt:
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
    asks = begins_message(request)
    tools = tools_of(request.tools or ()) or None
    fields = {"add_generation_prompt": asks, "continue_final_message": continues, "tools": tools}
    values = template_values(request.chat_template_kwargs, fields)
    documents = _documents(values.pop("documents", None))
    if request.documents is not None:
        documents = [{"text": one} if isinstance(one, str) else one for one in request.documents]
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
