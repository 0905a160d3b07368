"""LiteLLM: chats and streams, its router's fallbacks, a loop of tools, and errors by the names that it gives them."""

import json
from typing import Any

import litellm
import pytest
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "Name a colour of the sky."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def deployment(address: str, **more: object) -> dict[str, Any]:
    """One of a LiteLLM router's, called `main`."""
    params = {"model": "hosted_vllm/demo", "api_base": f"{address}/v1", "api_key": "none", "max_retries": 0, **more}
    return {"model_name": "main", "litellm_params": params}


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_a_chat_and_its_stream_say_the_same(torch_url: str, provider: str) -> None:
    asked: dict[str, Any] = {"model": f"{provider}/demo", "api_base": torch_url, "api_key": "none", "temperature": 0}
    whole = litellm.completion(messages=QUESTION, max_tokens=6, **asked)
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage.completion_tokens <= 6
    chunks = list(
        litellm.completion(
            messages=QUESTION, max_tokens=6, stream=True, stream_options={"include_usage": True}, **asked
        )
    )
    built: Any = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("first", ["dead", "late"])
async def test_its_router_goes_on_to_the_next_address(served: dict[str, str], first: str) -> None:
    more: dict[str, Any] = {}
    if first == "late":
        more = {"model": "hosted_vllm/fake-model", "extra_headers": {"X-KVFerry-First-Token-S": "1"}}
    router = litellm.Router(
        model_list=[deployment(served[first], **more), {**deployment(served["torch"]), "model_name": "other"}],
        fallbacks=[{"main": ["other"]}],
        num_retries=0,
    )
    with pytest.raises((litellm.InternalServerError, litellm.APIConnectionError, litellm.RateLimitError)) as failed:
        await router.acompletion("main", messages=QUESTION, max_tokens=4, disable_fallbacks=True)
    assert (first == "late") == isinstance(failed.value, litellm.RateLimitError)
    answer = await router.acompletion("main", messages=QUESTION, max_tokens=4, temperature=0)
    assert answer.choices[0].message.content and answer.model.endswith("demo")
    stream = await router.acompletion("main", messages=QUESTION, max_tokens=4, temperature=0, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == answer.choices[0].message.content


def test_a_loop_of_tools_comes_to_its_answer(tools_url: str) -> None:
    asked: dict[str, Any] = {"model": "hosted_vllm/fake-model", "api_base": tools_url, "api_key": "none"}
    messages: list[Any] = [{"role": "user", "content": "How is it in Zürich and in Rome?"}]
    first = litellm.completion(messages=messages, tools=[WEATHER], max_tokens=600, **asked)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls" and message.reasoning_content == "Two cities."
    assert [json.loads(call.function.arguments)["city"] for call in message.tool_calls] == ["Zürich", "Rome"]
    messages.append(message.model_dump())
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "18"} for call in message.tool_calls]
    last = litellm.completion(messages=messages, tools=[WEATHER], max_tokens=600, **asked)
    assert last.choices[0].message.content == "Rain there, sun here."


def test_a_prompt_that_is_too_long_is_its_own_error(torch_url: str) -> None:
    asked: dict[str, Any] = {"model": "hosted_vllm/demo", "api_base": torch_url, "api_key": "none"}
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 20_000}], max_tokens=4, **asked)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=QUESTION, **{**asked, "model": "hosted_vllm/other"})


class City(BaseModel, extra="forbid"):
    """A city and how many million people live in it."""

    name: str = Field(max_length=8)
    millions: int = Field(ge=0, le=9)


def test_an_answer_is_of_the_form_of_a_class(torch_url: str) -> None:
    asked: dict[str, Any] = {"model": "hosted_vllm/demo", "api_base": torch_url, "api_key": "none", "temperature": 0}
    answer = litellm.completion(messages=QUESTION, response_format=City, max_tokens=80, **asked)
    assert City.model_validate_json(answer.choices[0].message.content)


def test_a_tool_that_must_be_called_is(torch_url: str) -> None:
    # `hosted_vllm/` would take additionalProperties out of the schema.
    asked: dict[str, Any] = {"model": "openai/demo", "api_base": torch_url, "api_key": "none", "temperature": 0}
    city = {"type": "string", "maxLength": 8}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
    named = {"type": "function", "function": {"name": "get_weather"}}
    for must in ("required", named):
        answer = litellm.completion(messages=QUESTION, tools=[tool], tool_choice=must, max_tokens=80, **asked)
        call = answer.choices[0].message.tool_calls[0].function
        assert call.name == "get_weather" and json.loads(call.arguments).keys() == {"city"}
