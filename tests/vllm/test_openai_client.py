"""OpenAI's own client against the router: chats, streams with its helpers, and a loop of tools to its end.

It comes with vLLM, so that these tests run where vLLM's do. The nodes behind the router write what the test says.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pydantic
import pytest
from support.router_fakes import calls_then, serving, writes

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
QUESTION: dict[str, Any] = {"role": "user", "content": "How is it in Zürich and in Rome?"}
CALLS = (
    "<think>\nTwo cities.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)
ANSWER = "Rain there, sun here."
MORE: dict[str, Any] = {"model": "fake-model", "tools": TOOLS, "max_tokens": 600}


@asynccontextmanager
async def client() -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(calls_then(CALLS, ANSWER), "hermes") as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as one,
    ):
        yield one


def results(calls: Any) -> list[dict[str, Any]]:
    cities = [json.loads(call.function.arguments)["city"] for call in calls]
    assert cities == ["Zürich", "Rome"]
    return [{"role": "tool", "tool_call_id": call.id, "content": "18"} for call in calls]


async def test_a_loop_of_tools_comes_to_its_answer() -> None:
    async with client() as api:
        messages: list[Any] = [QUESTION]
        first = await api.chat.completions.create(messages=messages, **MORE)
        choice = first.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
        assert choice.message.model_extra and choice.message.model_extra["reasoning"] == "Two cities."
        messages += [choice.message, *results(choice.message.tool_calls)]
        last = await api.chat.completions.create(messages=messages, **MORE)
        assert (last.choices[0].finish_reason, last.choices[0].message.content) == ("stop", ANSWER)
        assert last.choices[0].message.tool_calls is None


async def test_the_streaming_helper_puts_the_same_message_together() -> None:
    async with client() as api:
        kinds, whole = set(), ""
        async with api.chat.completions.stream(messages=[QUESTION], **MORE) as stream:
            async for event in stream:
                kinds.add(event.type)
                if event.type == "tool_calls.function.arguments.delta":
                    whole += event.arguments_delta
            final = await stream.get_final_completion()
        choice = final.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
        assert results(choice.message.tool_calls)
        assert whole == '{"city": "Zürich"}{"city": "Rome"}'
        assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds


async def test_the_names_and_lengths_of_models_are_read() -> None:
    async with client() as api:
        (model,) = (await api.models.list()).data
        assert (await api.models.retrieve(model.id)).id == "fake-model"
        with pytest.raises(openai.NotFoundError):
            await api.chat.completions.create(model="other", messages=[QUESTION])
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            other: Any = {"type": "function", "function": {"name": "other"}}
            await api.chat.completions.create(messages=[QUESTION], tool_choice=other, **MORE)


# --- /v1/responses ----------------------------------------------------------------------------------------------------

FUNCTION: list[Any] = [{"type": "function", "strict": False, **TOOLS[0]["function"]}]
INPUT = QUESTION["content"]
RESPONSE: dict[str, Any] = {"model": "fake-model", "tools": FUNCTION, "max_output_tokens": 600}


def outputs(response: Any) -> list[dict[str, Any]]:
    calls = [item for item in response.output if item.type == "function_call"]
    assert [json.loads(call.arguments)["city"] for call in calls] == ["Zürich", "Rome"]
    return [{"type": "function_call_output", "call_id": call.call_id, "output": "18"} for call in calls]


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "sent again"])
async def test_a_loop_of_tools_over_responses_comes_to_its_answer(keeps: bool) -> None:
    async with client() as api:
        first = await api.responses.create(input=INPUT, store=keeps, **RESPONSE)
        assert (first.status, first.output_text) == ("completed", "Let me look.")
        assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
        if keeps:
            last = await api.responses.create(input=outputs(first), previous_response_id=first.id, **RESPONSE)
            assert (await api.responses.retrieve(first.id)).output == first.output
            await api.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError, match="no response"):
                await api.responses.retrieve(first.id)
        else:
            items: list[Any] = [{"role": "user", "content": INPUT}, *first.output, *outputs(first)]
            last = await api.responses.create(input=items, store=False, **RESPONSE)
        assert (last.status, last.output_text) == ("completed", ANSWER)
        assert last.usage and first.usage and last.usage.input_tokens > first.usage.input_tokens


async def test_the_streaming_helper_of_responses_puts_the_same_answer_together() -> None:
    async with client() as api:
        kinds, text, numbers = set(), "", []
        async with api.responses.stream(input=INPUT, **RESPONSE) as stream:
            async for event in stream:
                kinds.add(event.type)
                numbers.append(event.sequence_number)
                text += event.delta if event.type == "response.output_text.delta" else ""
            final = await stream.get_final_response()
        assert text == final.output_text == "Let me look." and outputs(final)
        assert numbers == list(range(len(numbers)))
        assert {"response.reasoning_text.delta", "response.function_call_arguments.done"} <= kinds
        whole = await api.responses.create(input=INPUT, **RESPONSE)
        assert [item.type for item in whole.output] == [item.type for item in final.output]


async def test_every_event_of_responses_is_one_of_openais_to_the_field() -> None:
    async with client() as api:
        raw = await api.responses.create(input=INPUT, stream=True, **RESPONSE)
        async for event in raw:
            type(event).model_validate(event.to_dict(), strict=True)
            assert (event.model_extra or {}).keys() <= {"name"}, "as vLLM names the call that is done"


class Weather(pydantic.BaseModel):
    city: str
    degrees: int


async def test_parsed_answers_are_values_of_the_clients_types() -> None:
    said = '{"city": "Rome", "degrees": 31}'
    async with (
        serving(writes(said), "hermes") as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api,
    ):
        parsed = await api.responses.parse(model="fake-model", input=INPUT, text_format=Weather)
        assert parsed.output_parsed == Weather(city="Rome", degrees=31)
        chat = await api.chat.completions.parse(model="fake-model", messages=[QUESTION], response_format=Weather)
        assert chat.choices[0].message.parsed == Weather(city="Rome", degrees=31)
        async with api.responses.stream(model="fake-model", input=INPUT, text_format=Weather) as stream:
            assert (await stream.get_final_response()).output_parsed == parsed.output_parsed


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
async def test_a_function_that_must_be_called_is_called_with_arguments_of_its_type(choice: Any) -> None:
    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    said = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "degrees": 31}}\n</tool_call>'
    async with (
        serving(writes(said), "hermes") as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api,
    ):
        for_chat = choice if isinstance(choice, str) else {"type": "function", "function": {"name": "get_weather"}}
        asked: dict[str, Any] = {"model": "fake-model", "messages": [QUESTION], "tool_choice": for_chat}
        chat = await api.chat.completions.parse(tools=[tool], **asked)
        (call,) = chat.choices[0].message.tool_calls or ()
        assert call.function.parsed_arguments == Weather(city="Rome", degrees=31)
        flat: Any = {"type": "function", **tool["function"]}
        reply = await api.responses.create(model="fake-model", input=INPUT, tools=[flat], tool_choice=choice)
        (item,) = reply.output
        assert item.type == "function_call" and Weather.model_validate_json(item.arguments).city == "Rome"
