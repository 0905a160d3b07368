"""OpenAI's own client: chats and responses, its helpers for streams, a loop of tools, answers as objects.

The loops in the form of a model that calls tools, and every event, are in tests/vllm/test_openai_client.py.
"""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

QUESTION: Any = {"role": "user", "content": "Name a colour of the sky."}
ASKED: dict[str, Any] = {"model": "demo", "temperature": 0}


class City(BaseModel):
    """A city and how many million people live in it."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=8)
    millions: int = Field(ge=0, le=9)


@pytest.fixture
def api(torch_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=torch_url, api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_and_its_stream_say_the_same(api: openai.OpenAI) -> None:
    more: dict[str, Any] = {"messages": [QUESTION], "max_tokens": 60, "stop": [" "], **ASKED}
    whole = api.chat.completions.create(**more)
    assert whole.choices[0].message.content and whole.usage and whole.usage.completion_tokens <= 60
    with api.chat.completions.stream(**more) as stream:  # of an answer that its length cuts off the helper makes none
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content == whole.choices[0].message.content
    completion = api.completions.create(prompt="The sky is", max_tokens=4, **ASKED)
    assert completion.choices[0].text


def test_a_response_and_its_stream_say_the_same_and_the_next_goes_on_from_it(api: openai.OpenAI) -> None:
    same: dict[str, Any] = {"max_output_tokens": 60, "extra_body": {"stop": [" "]}, **ASKED}
    whole = api.responses.create(input=QUESTION["content"], **same)
    with api.responses.stream(input=QUESTION["content"], **same) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text != ""
    last = api.responses.create(input="And at night?", previous_response_id=whole.id, **same)
    assert last.usage and whole.usage and last.usage.input_tokens > whole.usage.input_tokens


def test_an_answer_is_of_the_form_of_a_class(api: openai.OpenAI) -> None:
    ask: Any = {"role": "user", "content": "Name a city, in JSON."}
    chat = api.chat.completions.parse(messages=[ask], max_tokens=80, response_format=City, **ASKED)
    assert isinstance(chat.choices[0].message.parsed, City)
    response = api.responses.parse(input=[ask], max_output_tokens=80, text_format=City, **ASKED)
    assert isinstance(response.output_parsed, City)


def test_a_loop_of_tools_comes_to_its_answer(api: openai.OpenAI) -> None:
    tool: Any = openai.pydantic_function_tool(City, name="show_city")
    more = {"max_tokens": 80, "tools": [tool], **ASKED}
    first = api.chat.completions.create(messages=[QUESTION], tool_choice="required", parallel_tool_calls=False, **more)
    (call,) = first.choices[0].message.tool_calls or ()
    assert call.type == "function" and call.function.name == "show_city"
    assert City.model_validate(json.loads(call.function.arguments))
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "shown"}
    history: list[Any] = [QUESTION, first.choices[0].message, result]
    last = api.chat.completions.create(messages=history, tool_choice="none", **more)
    assert last.choices[0].message.content and not last.choices[0].message.tool_calls
    assert last.usage and first.usage and last.usage.prompt_tokens > first.usage.prompt_tokens
