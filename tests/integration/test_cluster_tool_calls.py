"""A loop of tools through real processes whose decoder dies in the middle of a call: valid to the last byte."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.cluster import ClusterHandle, cluster
from support.mid_answer import killed_at_work

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {
        "names": {
            "type": "array",
            "items": {"type": "string", "minLength": 4, "maxLength": 12},
            "minItems": 3,
            "maxItems": 3,
        },
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["names", "kind"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "feed", "parameters": SCHEMA}}]


async def streamed_call(
    subject: ClusterHandle, body: dict[str, Any], begun: set[str] | None = None
) -> tuple[dict[str, Any], str]:
    """(The call that its deltas make, why it ended). The answer's id goes into `begun` once its call has."""
    call: dict[str, Any] = {}
    reason = ""
    async for event in subject.events("/v1/chat/completions", body):
        if call and begun is not None:
            begun.add(event["id"])
        for choice in event["choices"]:
            reason = choice["finish_reason"] or reason
            for part in choice["delta"].get("tool_calls", ()):
                assert part["index"] == 0 and not choice["delta"].get("content")
                if "id" in part:
                    call = {"id": part["id"], "type": "function", "function": part["function"]}
                else:
                    call["function"]["arguments"] += part["function"]["arguments"]
    return call, reason


@pytest.mark.parametrize("parser", ["hermes", "glm"], ids=["in its own form", "as a list in JSON"])
async def test_a_loop_of_tools_goes_on_over_a_decoders_death(tmp_path: Path, parser: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Feed them."}]
    overrides = ("engine.inter_token_s=0.02", f"model.parser={parser}")
    async with cluster(tmp_path, overrides=overrides) as subject:
        body: dict[str, Any] = {"model": subject.config.model.name, "messages": messages, "tools": TOOLS}
        body |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 400, "seed": 5}
        begun: set[str] = set()

        async def in_its_call(record: dict[str, Any]) -> bool:
            return record["id"] in begun

        told = await killed_at_work(subject, lambda: streamed_call(subject, body, begun), at=in_its_call)
        assert told.after["retries"] == 1
        call, why = told.answer
        assert (call["function"]["name"], why) == ("feed", "tool_calls")
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "They have eaten."},
        ]
        second, _ = await streamed_call(subject, body)
        jsonschema.validate(json.loads(second["function"]["arguments"]), SCHEMA)
        assert second["id"] != call["id"]
        answer = await subject.chat(messages, tools=TOOLS, tool_choice="none", max_tokens=4)
        assert answer["choices"][0]["finish_reason"] == "length"
