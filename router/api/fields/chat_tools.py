"""What clients may send of tools: those that the model may call, and the calls in a conversation's history.

Owns their checks and the form in which vLLM's server hands them to the chat template, the order of the keys included.
"""

import json
from collections.abc import Mapping, Sequence

import msgspec

from router.api.fields.checks import require


class FunctionSpec(msgspec.Struct, frozen=True):
    """What a model is told of a function."""

    name: str
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """One that the model may call; there are only functions."""

    function: FunctionSpec
    type: str = "function"


def tools_of(tools: Sequence[Tool]) -> list[Mapping[str, object]]:
    """What the template sees of them."""
    return [_tool(f"tools[{number}]", tool) for number, tool in enumerate(tools)]


def _tool(where: str, tool: Tool) -> Mapping[str, object]:
    require(tool.type == "function", f"{where}.type", "must be function")
    function = tool.function
    seen: dict[str, object] = {
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
    }
    if function.strict is not None:
        seen["strict"] = function.strict
    return {"type": "function", "function": seen}


def call_of(where: str, call: Mapping[str, object]) -> Mapping[str, object]:
    """What the template sees of a call that the assistant has made: its arguments as an object."""
    function = call.get("function")
    require(call.get("type", "function") == "function", f"{where}.type", "must be function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        require(False, f"{where}.function", "must have a name")
        raise AssertionError
    arguments = _arguments(function.get("arguments"))
    seen = {**_first(function, "arguments", "name"), "arguments": arguments}
    return {**_first(call, "id", "function", "type"), "function": seen}


def _first(value: Mapping[str, object], *keys: str) -> dict[str, object]:
    """A copy in which these keys come before the others."""
    return {key: value[key] for key in (*keys, *value) if key in value}


def _arguments(given: object) -> Mapping[str, object]:
    """What is no JSON object is an empty one: the client cannot mend what a model once wrote, and wants to go on."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = None
    return given if isinstance(given, Mapping) else {}
