"""LlamaIndex's OpenAILike: chats, completions, their streams, and a function that is predicted and called."""

from typing import Any

from llama_index.core import PromptTemplate
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class City(BaseModel, extra="forbid"):
    """A city and how many million people live in it."""

    name: str = Field(max_length=8)
    millions: int = Field(ge=0, le=9)


QUESTION = [ChatMessage(role="user", content="Name a colour of the sky.")]


def like(url: str, model: str = "demo", **more: Any) -> OpenAILike:
    asked: dict[str, Any] = {"is_chat_model": True, "max_tokens": 6, "temperature": 0.0, "max_retries": 0, **more}
    return OpenAILike(model=model, api_base=url, api_key="none", context_window=2048, **asked)


def test_a_chat_and_its_stream_say_the_same(torch_url: str) -> None:
    model = like(torch_url)
    whole = model.chat(QUESTION).message.content
    assert whole and list(model.stream_chat(QUESTION))[-1].message.content == whole


def test_a_completion_and_its_stream_say_the_same(torch_url: str) -> None:
    model = like(torch_url, is_chat_model=False)
    whole = model.complete("The sky is").text
    assert whole and list(model.stream_complete("The sky is"))[-1].text == whole


async def test_a_function_is_predicted_and_called(tools_url: str) -> None:
    asked: list[str] = []

    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "18"

    model = like(tools_url, "fake-model", is_function_calling_model=True, max_tokens=600)
    tool = FunctionTool.from_defaults(get_weather)
    answer = await model.apredict_and_call([tool], "How is it in Zürich and Rome?", allow_parallel_tool_calls=True)
    assert asked == ["Zürich", "Rome"] and "18" in answer.response


def test_an_answer_is_of_the_form_of_a_class(torch_url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "City", "schema": City.model_json_schema()}}
    model = like(torch_url, max_tokens=80, additional_kwargs={"response_format": form})
    assert City.model_validate_json(model.chat(QUESTION).message.content or "")


def test_a_class_is_predicted_by_a_call(torch_url: str) -> None:
    model = like(torch_url, is_function_calling_model=True, strict=True, max_tokens=80)
    assert isinstance(model.structured_predict(City, PromptTemplate("Name a city.")), City)
