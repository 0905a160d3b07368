"""What clients may send to /v1/responses, and the chat that it is.

Source: https://platform.openai.com/docs/api-reference/responses/create; the translation is that of vLLM's server.
"""

from collections.abc import Sequence

import msgspec

from router.api.fields.cache_hints import CacheHintFields
from router.api.fields.chat_fields import ChatRequest, Effort
from router.api.fields.chat_messages import ChatMessage
from router.api.fields.chat_tools import FunctionSpec, Tool
from router.api.fields.checks import refuse, require
from router.api.fields.structured import StructuredOutputs
from router.api.openai_responses.items import InputItem, continues, messages_of, user_item

_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (
    _LOGPROBS,
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
)
"""What may be asked for beside the answer. But for the first there is never any of it."""
_FORMATS = ("text", "json_object", "json_schema")
NOT_HAD = (
    *("access_programs", "background_options", "context_management", "conversation", "enable_response_messages"),
    *("image", "previous_input_messages", "prompt"),
)
"""Fields that are refused."""
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "truncate_prompt_tokens": "truncation",
}
_SAME = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "chat_template_kwargs",
    "cache_salt",
    "user",
    "include_reasoning",
    "priority",
    "request_id",
    "vllm_xargs",
    "structured_outputs",
    "parallel_tool_calls",
    "cache_control",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "session_id",
)
"""Fields that are a chat's as they are."""


class FunctionTool(msgspec.Struct, frozen=True):
    """A function that the model may call. OpenAI's own tools have other types, and are refused."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The form of the answer's text: `text`, `json_object` or `json_schema`."""

    type: str
    name: str | None = None
    schema: dict[str, object] | None = None
    description: str | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the answer's text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How much is to be thought. No summary is ever made: the answer has the reasoning itself."""

    effort: Effort | None = None
    summary: object = None
    generate_summary: object = None
    context: object = None
    mode: str | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`include_obfuscation` is harmless: nothing is padded."""

    include_obfuscation: bool | None = None


class ResponsesRequest(CacheHintFields, frozen=True, kw_only=True):
    """Body of POST /v1/responses."""

    input: str | list[InputItem]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    """None: the answer is kept where that can be."""
    background: bool | None = False
    include: list[str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    """Of OpenAI's own tools, of which there are none."""
    metadata: dict[str, str] | None = None
    prompt: object = None
    reasoning: ReasoningSettings | None = None
    text: TextSettings | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = True
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    service_tier: str | None = None
    user: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    include_reasoning: bool | None = True
    chat_template_kwargs: dict[str, object] | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = 0
    request_id: str | None = None
    vllm_xargs: dict[str, str | int | float | list[str | int | float]] | None = None
    access_programs: object = None
    background_options: object = None
    context_management: object = None
    conversation: object = None
    enable_response_messages: object = None
    image: object = None
    previous_input_messages: object = None


def items_of(request: ResponsesRequest) -> list[InputItem]:
    """Of its `input`."""
    return [user_item(request.input)] if isinstance(request.input, str) else request.input


def chat_of_items(request: ResponsesRequest, before: Sequence[InputItem]) -> ChatRequest:
    """The chat that it asks for, after the items `before` it. Raises InvalidRequestError."""
    _check(request)
    items = [*before, *items_of(request)]
    require(len(items) > len(before), "input", "must not be empty")
    messages = messages_of(items, len(before))
    if request.instructions:
        messages.insert(0, ChatMessage("system", request.instructions))
    wants_logprobs = _LOGPROBS in (request.include or ())
    return ChatRequest(
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        continue_final_message=continues(items),
        truncate_prompt_tokens=-1 if request.truncation == "auto" else None,
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        logprobs=wants_logprobs,
        top_logprobs=request.top_logprobs if wants_logprobs else None,
        response_format=_response_format(request.text),
        tools=[_tool(number, tool) for number, tool in enumerate(request.tools or ())] or None,
        tool_choice=_choice(request.tool_choice),
        **{name: getattr(request, name) for name in _SAME},
    )


def name_here(field: str) -> str:
    """What this API calls a field of that chat."""
    return _NAMES.get(field, field)


def _check(request: ResponsesRequest) -> None:
    for name in NOT_HAD:
        refuse(name, getattr(request, name) not in (None, False, [], {}))
    require(not request.background, "background", "is not supported: ask with stream, or wait for the answer")
    require(request.truncation in (None, "auto", "disabled"), "truncation", "is auto or disabled")
    most = request.max_output_tokens
    require(most is None or most >= 1, "max_output_tokens", "must be at least 1")
    for name in request.include or ():
        require(name in _INCLUDED, "include", f"does not know {name!r}")
    if request.reasoning is not None:
        refuse("reasoning.mode", request.reasoning.mode not in (None, "standard"))
    if request.text is not None:
        verbosity = request.text.verbosity
        require(verbosity in (None, "medium"), "text.verbosity", "is not supported: ask for it in the prompt")


def _response_format(text: TextSettings | None) -> dict[str, object] | None:
    wanted = text.format if text is not None else None
    require(wanted is None or wanted.type in _FORMATS, "text.format.type", f"is {', '.join(_FORMATS)}")
    if wanted is None or wanted.type != "json_schema":
        return None if wanted is None else {"type": wanted.type}
    require(wanted.schema is not None, "text.format.schema", "is missing")
    require(bool(wanted.name), "text.format.name", "is missing")
    schema = {"name": wanted.name, "schema": wanted.schema, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": schema}


def _tool(number: int, tool: FunctionTool) -> Tool:
    where = f"tools[{number}]"
    require(tool.type == "function", f"{where}.type", f"{tool.type!r} is not supported: there are functions")
    require(bool(tool.name), f"{where}.name", "is missing")
    return Tool(FunctionSpec(tool.name, tool.description, tool.parameters, tool.strict))


def _choice(choice: str | dict[str, object] | None) -> str | dict[str, object] | None:
    if not isinstance(choice, dict):
        return choice
    named = choice.get("type") == "function" and isinstance(choice.get("name"), str)
    require(named, "tool_choice", "is none, auto, required or a function's type and name")
    return {"type": "function", "function": {"name": choice["name"]}}
