"""Anthropic's own client against the router: messages, streams with its helper, and a loop of tools to its end.

It comes with vLLM, so that these tests run where vLLM's do. The nodes behind the router write what the test says.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest
from support.router_fakes import calls_then, serving

TOOLS: list[Any] = [
    {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}},
]
CALLS = (
    "<think>\nOne city.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
)
ANSWER = "It rains."
QUESTION: Any = {"role": "user", "content": "How is it in Zürich?"}
MORE: dict[str, Any] = {"model": "fake-model", "tools": TOOLS, "max_tokens": 600}


@asynccontextmanager
async def client() -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with (
        serving(calls_then(CALLS, ANSWER), "hermes") as url,
        anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as one,
    ):
        yield one


async def test_a_loop_of_tools_comes_to_its_answer() -> None:
    async with client() as api:
        first = await api.messages.create(messages=[QUESTION], **MORE)
        assert first.stop_reason == "tool_use"
        call = first.content[-1]
        assert call.type == "tool_use" and call.input == {"city": "Zürich"}
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "18"}
        history: list[Any] = [QUESTION, {"role": "assistant", "content": first.content}]
        last = await api.messages.create(messages=[*history, {"role": "user", "content": [result]}], **MORE)
        assert (last.stop_reason, last.content[0].text) == ("end_turn", ANSWER)  # type: ignore[union-attr]


async def test_the_streaming_helper_puts_the_same_message_together() -> None:
    async with client() as api:
        async with api.messages.stream(messages=[QUESTION], **MORE) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "Let me look."
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
        assert final.content[-1].input == {"city": "Zürich"}  # type: ignore[union-attr]
        counted = await api.messages.count_tokens(model="fake-model", messages=[QUESTION], tools=TOOLS)
        assert counted.input_tokens == final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)


async def test_errors_are_those_of_its_library() -> None:
    async with client() as api:
        with pytest.raises(anthropic.NotFoundError):
            await api.messages.create(model="other", messages=[QUESTION], max_tokens=3)
        with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
            await api.messages.create(messages=[QUESTION], tool_choice={"type": "tool", "name": "other"}, **MORE)
