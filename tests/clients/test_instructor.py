"""Instructor: what a model says as objects of a class, by its calls of tools."""

from collections.abc import Iterable
from typing import Any

import instructor
import openai
from pydantic import BaseModel

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
