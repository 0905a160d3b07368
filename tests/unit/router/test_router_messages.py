"""Anthropic's Messages API: the chat that a body is, and the bodies and events of its answers."""

import json
from typing import Any

import httpx
import pytest
from support.router_fakes import MARK, asking, make_rig, two_and_two

from kvcore.errors import InvalidRequestError
from router.api.anthropic.messages import MessagesRequest, chat_of
from router.api.body import parse

TOOLS = [{"name": "get_weather", "input_schema": {"properties": {"city": {"type": "string"}}}}]
CALLS = (
    "<think>\nOne city.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
)
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "How is it?"}], "max_tokens": 500, "tools": TOOLS}
HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "How is it?", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "One city.", "signature": ""},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Zürich"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "18"}]},
            {"type": "text", "text": "And now?"},
        ],
    },
]


def events_of(text: str) -> list[dict[str, Any]]:
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def test_an_answer_is_blocks_of_thinking_text_and_calls() -> None:
    async with asking(CALLS, "hermes") as (http, _):
        reply = (await http.post("/v1/messages", json=ASK)).json()
    thinking, text, call = reply["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "One city.")
    assert text == {"type": "text", "text": "Let me look."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Zürich"})
    assert (reply["type"], reply["role"], reply["stop_reason"]) == ("message", "assistant", "tool_use")
    assert reply["id"].startswith("msg") and reply["model"] == "fake-model"
    usage = reply["usage"]
    assert usage["output_tokens"] == len(CALLS.encode()) + 1
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] > 10


async def test_a_thought_that_was_cut_has_no_empty_text_behind_it() -> None:
    """Anthropic's servers take no empty text back."""
    async with asking("<think>\nOne", "hermes") as (http, _):
        reply = (await http.post("/v1/messages", json=ASK)).json()
    assert reply["content"] == [{"type": "thinking", "thinking": "One", "signature": ""}]


async def test_a_stream_begins_and_ends_each_block() -> None:
    async with asking(CALLS, "hermes") as (http, _):
        events = events_of((await http.post("/v1/messages", json={**ASK, "stream": True})).text)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"] and kinds[-2:] == ["message_delta", "message_stop"]
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [event["content_block"]["type"] for event in starts] == ["thinking", "text", "tool_use"]
    assert [event["index"] for event in starts] == [0, 1, 2]
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert stops == [0, 1, 2]
    texts = dict.fromkeys(stops, "")
    for event in events:
        if event["type"] == "content_block_delta":
            field = {"thinking_delta": "thinking", "text_delta": "text", "input_json_delta": "partial_json"}
            texts[event["index"]] += event["delta"][field[event["delta"]["type"]]]
    assert texts == {0: "One city.", 1: "Let me look.", 2: '{"city": "Zürich"}'}
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == len(CALLS.encode()) + 1


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({"stop_sequences": ["loo"]}, "stop_sequence", "loo"),
        ({"max_tokens": 40}, "max_tokens", None),
        ({}, "end_turn", None),
    ],
)
async def test_why_an_answer_ended(fields: dict[str, object], reason: str, sequence: str | None) -> None:
    async with asking("Let me look at this for as long as it takes.", "none") as (http, _):
        reply = (await http.post("/v1/messages", json={**ASK, "tools": [], **fields})).json()
        assert (reply["stop_reason"], reply["stop_sequence"]) == (reason, sequence)
        counted = {key: value for key, value in ASK.items() if key not in ("max_tokens", "tools")}
        count = (await http.post("/v1/messages/count_tokens", json=counted)).json()["input_tokens"]
        assert count == reply["usage"]["input_tokens"] + reply["usage"]["cache_read_input_tokens"]
        assert count > len(MARK)


def test_a_history_is_the_chat_that_openais_would_be() -> None:
    raw = json.dumps({**ASK, "messages": HISTORY, "system": [{"type": "text", "text": "Be brief."}]}).encode()
    chat = chat_of(parse(raw, MessagesRequest))
    assert [(one.role, one.tool_call_id) for one in chat.messages] == [
        ("system", None),
        ("user", None),
        ("assistant", None),
        ("tool", "call_1"),
        ("user", None),
    ]
    assistant = chat.messages[2]
    assert (assistant.content, assistant.reasoning) == ("Let me look.", "One city.")
    assert assistant.tool_calls == [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Z\\u00fcrich"}'},
        }
    ]
    assert chat.messages[3].content == "18"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content"),
        ({"tools": [{"name": "bash", "type": "bash_20250124"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat_of(parse(json.dumps({**ASK, **fields}).encode(), MessagesRequest))
    assert caught.value.param == param


# --- errors -----------------------------------------------------------------------------------------------------------


async def test_errors_have_anthropics_form_whatever_raised_them() -> None:
    long = {"model": "x" * 4096}
    async with asking(CALLS, "hermes") as (http, rig):
        rig.nodes["d0"].down = rig.nodes["d1"].down = rig.nodes["p0"].down = rig.nodes["p1"].down = True
        for path, method, body, status, kind in (
            ("/v1/messages", "POST", ASK | {"model": "other"}, 404, "not_found_error"),
            ("/v1/messages", "POST", ASK | {"max_tokens": None}, 400, "invalid_request_error"),
            ("/v1/messages/", "POST", ASK | {"max_tokens": 10**6}, 400, "invalid_request_error"),
            ("/v1/messages", "GET", {}, 405, "invalid_request_error"),
            ("/v1/messages/count_tokens", "POST", {"messages": [long]}, 400, "invalid_request_error"),
            ("/v1/messages", "POST", ASK, 503, "overloaded_error"),
        ):
            reply = await http.request(method, path, json=body)
            error = reply.json()
            assert (reply.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
            assert error["error"]["message"] and error["error"].keys() == {"type", "message"}
            assert error["request_id"] == reply.headers["x-request-id"] == reply.headers["request-id"]
        others = (await http.post("/v1/chat/completions", json={"messages": []})).json()
        assert others["error"]["param"] == "messages", "of other endpoints errors are OpenAI's"


async def test_output_config_is_a_schema_and_an_effort() -> None:
    """Agents send both with every request."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    async with asking(CALLS, "hermes") as (http, rig):
        ask = {key: value for key, value in ASK.items() if key != "tools"}
        assert (await http.post("/v1/messages", json={**ask, "output_config": given})).status_code == 200
        assert (await http.post("/v1/messages/count_tokens", json={**ask, "output_config": given})).status_code == 200
        (sent,) = [request.sampling for node in rig.nodes.nodes for request in node.generates]
        assert sent.grammar is not None and json.loads(sent.grammar.text) == schema
        for wrong in ({"type": "text"}, {"type": "json_schema"}, {"type": "json_schema", "schema": {"not": {}}}):
            error = (await http.post("/v1/messages", json={**ask, "output_config": {"format": wrong}})).json()["error"]
            assert error["message"].startswith("output_config.format"), error
    chat = chat_of(parse(json.dumps({**ASK, "output_config": given}).encode(), MessagesRequest))
    assert chat.reasoning_effort == "high"


async def test_a_stream_that_fails_ends_with_anthropics_event() -> None:
    async with asking("a" * 400, "none") as (http, rig):
        for node in rig.nodes.nodes:
            node.die_after, node.stays_dead = 5, True
        text = (await http.post("/v1/messages", json={**ASK, "tools": [], "stream": True})).text
    last = events_of(text)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error") and last["error"]["message"]


async def test_a_stream_that_waits_in_vain_for_a_node_ends_with_anthropics_event() -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.down = True
    rig = await make_rig(nodes, wait_s=0.02)
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        text = (await http.post("/v1/messages", json={**ASK, "tools": [], "stream": True})).text
    waiting, last = text[: text.index("event: ")], events_of(text[text.index("event: ") :])[-1]
    assert waiting.startswith(": no node is up")
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")
