"""Chats whose answers call tools or think aloud: what clients get of them, whole and in pieces."""

import json
from typing import Any

import httpx
import pytest
from support.router_fakes import asking

from kvcore.errors import ConfigError
from router.parsing.dialects import DIALECTS, find_dialect

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
CALLS = (
    "<think>\nTwo things.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "How is it?"}],
    "tools": TOOLS,
    "max_tokens": 500,
    "stop_token_ids": [0],
}


async def whole(http: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    reply = await http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice  # type: ignore[no-any-return]


async def streamed(http: httpx.AsyncClient, **fields: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the choice, put together as OpenAI's clients do; its deltas)."""
    reply = await http.post("/v1/chat/completions", json={**CHAT, "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    reason, deltas = None, []
    for event in events:
        (choice,) = json.loads(event)["choices"]
        delta = choice["delta"]
        deltas.append(delta)
        assert reason is None, "nothing comes after the end"
        reason = choice["finish_reason"]
        for key in ("content", "reasoning"):
            message[key] += delta.get(key) or ""
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(message["tool_calls"]):
                assert part["id"] and part["type"] == "function" and part["function"]["name"]
                message["tool_calls"].append({"id": part["id"], "name": part["function"]["name"], "arguments": ""})
            message["tool_calls"][part["index"]]["arguments"] += part["function"]["arguments"]
    return {"message": message, "finish_reason": reason}, deltas


def called(message: dict[str, Any]) -> list[tuple[str, Any]]:
    functions = [call.get("function", call) for call in message.get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


WANTED = [("get_weather", {"city": "Zürich"}), ("get_time", {})]


async def test_calls_reasoning_and_text_are_fields_of_the_message() -> None:
    async with asking(CALLS, "hermes") as (http, _):
        choice = await whole(http)
    message = choice["message"]
    assert (message["content"], message["reasoning"]) == ("Let me look.", "Two things.")
    assert message["reasoning_content"] == message["reasoning"]
    assert called(message) == WANTED
    assert choice["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


async def test_a_stream_of_calls_is_openais() -> None:
    async with asking(CALLS, "hermes") as (http, _):
        choice, deltas = await streamed(http)
    message = choice["message"]
    assert (message["content"], message["reasoning"]) == ("Let me look.", "Two things.")
    assert called(message) == WANTED
    assert choice["finish_reason"] == "tool_calls"
    begins = [part for delta in deltas for part in delta.get("tool_calls", ()) if "id" in part]
    assert [part["function"] for part in begins] == [
        {"name": "get_weather", "arguments": ""},
        {"name": "get_time", "arguments": ""},
    ]
    parts = [delta for delta in deltas if "tool_calls" in delta]
    assert len(parts) > 6, "arguments come as they are written"
    assert deltas[-1] == {}


async def test_without_a_call_the_answer_is_text_and_stops() -> None:
    async with asking("It is 1 < 2, <tool", "hermes") as (http, _):
        choice = await whole(http)
        assert choice["message"] == {"role": "assistant", "content": "It is 1 < 2, <tool", "refusal": None}
        assert choice["finish_reason"] == "stop"
        assert (await streamed(http))[0]["message"]["content"] == "It is 1 < 2, <tool"


@pytest.mark.parametrize("choice", ["none", "auto", None])
async def test_tool_choice_says_whether_calls_are_read(choice: str | None) -> None:
    async with asking(CALLS, "hermes") as (http, rig):
        answer = await whole(http, tool_choice=choice)
        assert bool(answer["message"].get("tool_calls")) == (choice != "none")
        if choice == "none":
            assert answer["message"]["content"].startswith("Let me look.\n<tool_call>")
        assert rig.log.total == 1


async def test_an_answer_ends_where_a_call_begins_that_is_not_wanted() -> None:
    up_to_its_name = CALLS[: CALLS.index(" {}}")].encode()
    async with asking(CALLS, "hermes") as (http, rig):
        reply = (await http.post("/v1/chat/completions", json={**CHAT, "parallel_tool_calls": False})).json()
        (choice,) = reply["choices"]
        assert called(choice["message"]) == WANTED[:1] and choice["finish_reason"] == "tool_calls"
        assert reply["usage"]["completion_tokens"] == len(up_to_its_name) < len(CALLS.encode())
        cut, _ = await streamed(http, parallel_tool_calls=False)
        assert called(cut["message"]) == WANTED[:1] and cut["finish_reason"] == "tool_calls"
        assert rig.log.total == 2


async def test_reasoning_is_left_out_for_who_does_not_want_it() -> None:
    async with asking(CALLS, "hermes") as (http, _):
        message = (await whole(http, include_reasoning=False))["message"]
        assert "reasoning" not in message and message["content"] == "Let me look."
        assert (await streamed(http, include_reasoning=False))[0]["message"]["reasoning"] == ""


async def test_a_call_that_is_cut_off_is_none() -> None:
    async with asking(CALLS, "hermes") as (http, _):
        choice = await whole(http, max_tokens=len(CALLS.partition("Zü")[0].encode()))
        assert choice["finish_reason"] == "length"
        assert "tool_calls" not in choice["message"]
        assert (await streamed(http, max_tokens=150))[0]["finish_reason"] == "length"


async def test_an_answer_that_ends_in_a_call_has_called_nothing_streamed_or_not() -> None:
    async with asking(CALLS.partition("}}")[0] + "}", "hermes") as (http, _):
        choice, (streams, _deltas) = await whole(http), await streamed(http)
    assert "tool_calls" not in choice["message"]
    assert (choice["finish_reason"], streams["finish_reason"]) == ("stop", "stop")


async def test_a_call_goes_on_when_its_decoder_dies_in_the_middle() -> None:
    async with asking(CALLS, "hermes") as (http, rig):
        for node in rig.nodes.nodes:
            node.die_after = len(CALLS.partition("Zü")[0].encode())
        choice, _ = await streamed(http)
        assert called(choice["message"]) == WANTED
        assert choice["finish_reason"] == "tool_calls"


async def test_logprobs_and_token_ids_are_those_of_all_that_was_written() -> None:
    async with asking(CALLS, "hermes") as (http, _):
        choice = await whole(http, logprobs=True, return_token_ids=True)
        assert bytes(choice["token_ids"][:-1]).decode() == CALLS
        reply = await http.post("/v1/chat/completions", json={**CHAT, "stream": True, "return_token_ids": True})
        events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line and "[DONE]" not in line]
        ids = [one for event in events for one in event["choices"][0].get("token_ids") or ()]
        assert bytes(ids[:-1]).decode() == CALLS


async def test_the_history_of_a_tools_loop_is_taken_back() -> None:
    async with asking(CALLS, "hermes") as (http, _):
        message = (await whole(http))["message"]
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "4"} for call in message["tool_calls"]]
        await whole(http, messages=[*CHAT["messages"], message, *results])


async def test_what_cannot_be_had_is_refused_by_name() -> None:
    async with asking(CALLS, "none") as (http, _):
        reply = await http.post("/v1/chat/completions", json=CHAT)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")
        assert "model.parser" in reply.json()["error"]["message"]
        assert (await http.post("/v1/chat/completions", json={**CHAT, "tool_choice": "none"})).status_code == 200
    async with asking(CALLS, "hermes") as (http, _):
        named = {"type": "function", "function": {"name": "get_times"}}
        for choice in ("some", named):
            reply = await http.post("/v1/chat/completions", json={**CHAT, "tool_choice": choice})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tool_choice")


async def test_mistrals_ids_are_short_and_kimis_its_own() -> None:
    async with asking("[TOOL_CALLS]get_time[ARGS]{}", "mistral") as (http, _):
        (call,) = (await whole(http))["message"]["tool_calls"]
        assert len(call["id"]) == 9 and call["id"].isalnum()
    section = "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0<|tool_call_argument_begin|>{}"
    async with asking(section + "<|tool_call_end|><|tool_calls_section_end|>", "kimi_k2") as (http, _):
        (call,) = (await whole(http))["message"]["tool_calls"]
        assert call["id"] == "functions.get_time:0"


def test_a_dialect_is_found_by_name_by_template_or_as_ones_own() -> None:
    assert find_dialect("auto", "") is None and find_dialect("none", "<tool_call>") is None
    assert find_dialect("auto", "{{ '<tool_call>' }}") is DIALECTS["hermes"]
    assert find_dialect("glm", "") is DIALECTS["glm"]
    for wrong in ("hermess", "no.such.module:x", "json:loads", "json:nothing"):
        with pytest.raises(ConfigError, match=r"model\.parser"):
            find_dialect(wrong, "")
