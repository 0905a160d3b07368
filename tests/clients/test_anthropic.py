"""Anthropic's own client: messages, its helper for streams, and a loop of tools.

Loops of a model that thinks and calls tools, and errors, are in tests/vllm/test_anthropic_client.py.
"""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

QUESTION: Any = {"role": "user", "content": "Name a colour of the sky."}
ASKED: dict[str, Any] = {"model": "demo", "extra_body": {"temperature": 0}}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture
def api(served: dict[str, str]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served["torch"], api_key="none", max_retries=0) as client:
        yield client


def test_a_message_and_its_stream_say_the_same(api: anthropic.Anthropic) -> None:
    whole = api.messages.create(messages=[QUESTION], max_tokens=6, **ASKED)
    (block,) = whole.content
    with api.messages.stream(messages=[QUESTION], max_tokens=6, **ASKED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert block.type == "text" and text == block.text != ""
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    counted = api.messages.count_tokens(model="demo", messages=[QUESTION])
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_a_loop_of_tools_comes_to_its_answer(api: anthropic.Anthropic) -> None:
    tools: list[Any] = [{"name": "get_weather", "input_schema": SCHEMA}]
    must: Any = {"type": "tool", "name": "get_weather"}
    first = api.messages.create(messages=[QUESTION], max_tokens=80, tools=tools, tool_choice=must, **ASKED)
    call = first.content[-1]
    assert first.stop_reason == "tool_use" and call.type == "tool_use" and list(call.input) == ["city"]
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "18"}
    history: list[Any] = [QUESTION, {"role": "assistant", "content": first.content}]
    history.append({"role": "user", "content": [result]})
    last = api.messages.create(messages=history, max_tokens=6, tools=tools, tool_choice={"type": "none"}, **ASKED)
    assert last.content[0].type == "text" and last.usage.input_tokens > 0
