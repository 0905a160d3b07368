"""LangChain's ChatOpenAI: chats, streams with usage, and a loop of bound tools to its answer."""

from typing import Any

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

QUESTION = "How is it in Zürich and in Rome?"


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"18 in {city}"


class City(BaseModel, extra="forbid"):
    """A city and how many million people live in it."""

    name: str = Field(max_length=8)
    millions: int = Field(ge=0, le=9)


class Weather(BaseModel, extra="forbid"):
    """The weather in a city."""

    city: str = Field(max_length=8)


def chat(url: str, model: str = "demo", **more: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_retries=0, **more)


def test_a_chat_and_its_stream_say_the_same(torch_url: str) -> None:
    model = chat(torch_url, max_completion_tokens=6)
    whole = model.invoke("Name a colour of the sky.")
    assert whole.content and whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] <= 6
    streamed: Any = None
    for chunk in model.stream("Name a colour of the sky.", stream_usage=True):
        streamed = chunk if streamed is None else streamed + chunk
    assert isinstance(streamed, AIMessageChunk) and streamed.content == whole.content
    assert streamed.usage_metadata is not None
    assert streamed.usage_metadata["input_tokens"] == whole.usage_metadata["input_tokens"]


async def test_many_are_asked_at_once(torch_url: str) -> None:
    answers = await chat(torch_url, max_completion_tokens=4).abatch(["One", "Two", "Three"])
    assert all(answer.content for answer in answers)


def test_a_loop_of_bound_tools_comes_to_its_answer(tools_url: str) -> None:
    model = chat(tools_url, "fake-model", max_completion_tokens=600).bind_tools([get_weather])
    messages: list[Any] = [HumanMessage(QUESTION)]
    first: Any = model.invoke(messages)
    assert [call["args"]["city"] for call in first.tool_calls] == ["Zürich", "Rome"]
    messages += [first, *(get_weather.invoke(call) for call in first.tool_calls)]
    assert all(isinstance(message, ToolMessage) for message in messages[2:])
    assert model.invoke(messages).content == "Rain there, sun here."


def test_streamed_calls_are_put_together(tools_url: str) -> None:
    model = chat(tools_url, "fake-model", max_completion_tokens=600).bind_tools([get_weather])
    whole: Any = None
    for chunk in model.stream([HumanMessage(QUESTION)]):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [
        ("get_weather", {"city": "Zürich"}),
        ("get_weather", {"city": "Rome"}),
    ]


def test_an_answer_is_of_the_form_of_a_class(torch_url: str) -> None:
    model = chat(torch_url, max_completion_tokens=80).with_structured_output(City, method="json_schema")
    assert isinstance(model.invoke("Name a city, in JSON."), City)


def test_a_tool_that_must_be_called_is(torch_url: str) -> None:
    for must in ("any", "Weather"):
        model = chat(torch_url, max_completion_tokens=80).bind_tools([Weather], tool_choice=must)
        (call,) = model.invoke("Hello").tool_calls[:1]
        assert call["name"] == "Weather" and Weather.model_validate(call["args"])
    answer = chat(torch_url, max_completion_tokens=80).with_structured_output(City, method="function_calling")
    assert isinstance(answer.invoke("Name a city."), City)
