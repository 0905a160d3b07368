"""Calls that must be made, by vLLM engines: their arguments follow the schema, whole and streamed."""

import json
from typing import Any

import jsonschema
import pytest
from support.cluster import ClusterHandle

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="session")]

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "feed", "parameters": SCHEMA}}]
NAMED = {"type": "function", "function": {"name": "feed"}}


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")], ids=["required", "named"])
async def test_a_call_is_made_by_its_schema(subject: ClusterHandle, choice: Any, reason: str) -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    fields |= {"max_tokens": 600, "temperature": 1.0, "seed": 3}
    messages = [{"role": "user", "content": "Feed them."}]
    answer = (await subject.chat(messages, **fields))["choices"][0]
    assert answer["finish_reason"] == reason
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "feed"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    arguments = ""
    body = {"model": subject.config.model.name, "messages": messages, **fields}
    async for event in subject.events("/v1/chat/completions", body):
        for choice_ in event["choices"]:
            for part in choice_["delta"].get("tool_calls", ()):
                arguments += part["function"]["arguments"]
    jsonschema.validate(json.loads(arguments), SCHEMA)
