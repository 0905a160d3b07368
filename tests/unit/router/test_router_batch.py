"""vLLM's /v1/chat/completions/batch: several chats at a time, a choice each."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from support.router_fakes import Rig, asking, client_of, make_rig

PATH = "/v1/chat/completions/batch"
CHATS = [
    [{"role": "user", "content": "How is it?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "And in Rome?"}],
    [{"role": "user", "content": "x" * 100}],
]
SAME = {"max_tokens": 8, "temperature": 0}


@pytest.fixture
async def rig() -> Rig:
    return await make_rig()


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(rig) as client:
        yield client


async def alone(http: httpx.AsyncClient, **fields: Any) -> list[Any]:
    """The answers to the same chats, each by itself."""
    replies = [await http.post("/v1/chat/completions", json={"messages": chat, **SAME, **fields}) for chat in CHATS]
    return [reply.json() for reply in replies]


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}, {"stop": ["a", "b", "c"]}]
)
async def test_each_chat_gets_the_answer_that_it_gets_alone(http: httpx.AsyncClient, fields: Any) -> None:
    reply = (await http.post(PATH, json={"messages": CHATS, **SAME, **fields})).json()
    each = await alone(http, **fields)
    assert reply["choices"] == [
        one["choices"][0] | {"index": index} for index, one in enumerate(each) if one["object"] == "chat.completion"
    ]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert reply["usage"][name] == sum(one["usage"][name] for one in each)
    assert (reply["object"], reply["model"]) == ("chat.completion", "fake-model")
    assert reply["id"].startswith("chatcmpl-") and "prompt_token_ids" not in reply


async def test_each_has_its_own_reasoning_and_echo() -> None:
    async with asking("<think>\nHm.\n</think>\n\nWell.", "hermes") as (http, _):
        fields = {"messages": CHATS, "max_tokens": 100, "echo": True, "request_id": "mine"}
        reply = (await http.post(PATH, json=fields)).json()
        messages = [*CHATS[:2], [*CHATS[2], {"role": "assistant", "content": "So: "}]]
        continued = {"messages": messages, "max_tokens": 100, "add_generation_prompt": False, "echo": True}
        more = (await http.post(PATH, json=continued)).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == ["Well."] * 3
    assert [choice["message"]["reasoning"] for choice in reply["choices"]] == ["Hm."] * 3
    assert reply["id"] == "chatcmpl-mine"
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3 * len("\nHm.\n")}
    assert [choice["message"]["content"][:4] for choice in more["choices"]] == ["How ", "And ", "So: "]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [CHATS[0], []]}, "messages[1]"),
        ({"messages": CHATS[0]}, "messages[0]"),
        ({"messages": [CHATS[0]] * 129}, "messages"),
        ({"messages": [CHATS[0], [{"role": "user"}]]}, "messages[1][0].content"),
        ({"messages": [CHATS[0], [{"role": "user", "content": "a", "tool_calls": [{}]}]]}, "messages[1][0].tool_calls"),
        ({"messages": [CHATS[0] * 5000, CHATS[0] * 5000]}, "messages"),
        ({"n": 2}, "n"),
        ({"stream": True}, "stream"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"return_prompt_text": True}, "return_prompt_text"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"temperatur": 1}, "temperatur"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_runs(
    http: httpx.AsyncClient, rig: Rig, fields: Any, param: str
) -> None:
    reply = await http.post(PATH, json={"messages": CHATS, **SAME, **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert param in reply.json()["error"]["message"]
    assert not any(node.generates for node in rig.nodes.nodes)


async def test_what_asks_for_nothing_is_taken(http: httpx.AsyncClient) -> None:
    nothing: dict[str, Any] = {
        "n": None,
        "stream": False,
        "tools": [],
        "tool_choice": "none",
        "return_prompt_text": False,
    }
    assert (await http.post(PATH, json={"messages": CHATS, **SAME, **nothing})).status_code == 200
