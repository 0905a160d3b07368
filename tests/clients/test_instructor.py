"""Instructor: what a model says as objects of a class, by its calls of tools."""

from collections.abc import Iterable
from typing import Any

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

QUESTION: Any = [{"role": "user", "content": "How is it in Zürich and in Rome?"}]


class get_weather(BaseModel):  # noqa: N801 - the name of the function that the model calls
    """The weather in a city."""

    city: str


def test_several_calls_are_several_objects(tools_url: str) -> None:
    with openai.OpenAI(base_url=tools_url, api_key="none", max_retries=0) as api:
        client: Any = instructor.from_openai(api, mode=instructor.Mode.PARALLEL_TOOLS)
        found = client.chat.completions.create(
            model="fake-model", messages=QUESTION, max_tokens=600, response_model=Iterable[get_weather], max_retries=0
        )
        assert [one.city for one in found] == ["Zürich", "Rome"]


class City(BaseModel, extra="forbid"):
    """A city and how many million people live in it."""

    name: str = Field(max_length=8)
    millions: int = Field(ge=0, le=9)


@pytest.mark.parametrize("mode", [instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS])
def test_an_answer_is_of_the_form_of_a_class(torch_url: str, mode: instructor.Mode) -> None:
    with openai.OpenAI(base_url=torch_url, api_key="none", max_retries=0) as api:
        client: Any = instructor.from_openai(api, mode=mode)
        city = client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=80, temperature=0, response_model=City, max_retries=0
        )
        assert isinstance(city, City)
