"""OpenAI's Responses API: the chat that a body is, the bodies and events of its answers, and what is kept of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from support.router_fakes import calls_then, make_rig, two_and_two, writes, writing_rig

from kvcore.clock import ManualClock
from kvcore.errors import InvalidRequestError, ResponseNotFoundError
from kvcore.process.service import Lifecycle
from router.api.body import parse
from router.api.openai_responses.kept import KeepLimits, KeptResponses, keep_responses
from router.api.openai_responses.request import ResponsesRequest, chat_of_items

TOOLS = [{"type": "function", "name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}}]
CALLS = (
    "<think>\nOne city.\n</think>\n\nLet me look.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
)
ANSWER = "It rains."
ASK: dict[str, Any] = {"input": "How is it?", "max_output_tokens": 500, "tools": TOOLS}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "input_text", "text": "How is it?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "One city."}]},
    {
        "type": "message",
        "role": "assistant",
        "id": "msg_1",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": None}],
    },
    {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Zürich"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "18"},
    {"role": "user", "content": "And now?"},
]


def asked(**fields: object) -> Any:
    return parse(json.dumps({**ASK, **fields}).encode(), ResponsesRequest)


def events_of(text: str) -> list[dict[str, Any]]:
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


@asynccontextmanager
async def asking(tokens: Any, kept: KeptResponses | None = None, parser: str = "hermes") -> AsyncIterator[Any]:
    """A client of a router whose nodes write `tokens`, and that keeps answers in `kept`."""
    rig = await writing_rig(tokens, parser, kept=kept)
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        yield http


def test_items_are_the_chat_that_they_stand_for() -> None:
    chat = chat_of_items(asked(input=HISTORY, instructions="Be brief."), [])
    assert [(one.role, one.tool_call_id) for one in chat.messages] == [
        ("system", None),
        ("user", None),
        ("assistant", None),
        ("tool", "call_1"),
        ("user", None),
    ]
    assistant = chat.messages[2]
    assert (assistant.content, assistant.reasoning) == ("Let me look.", "One city.")
    function = {"name": "get_weather", "arguments": '{"city": "Zürich"}'}
    assert assistant.tool_calls == [{"id": "call_1", "type": "function", "function": function}]
    assert (chat.messages[1].content, chat.messages[3].content) == ("How is it?", "18")
    assert (chat.max_completion_tokens, chat.continue_final_message) == (500, False)


def test_an_answer_that_was_cut_off_is_gone_on_with() -> None:
    cut = {"type": "message", "role": "assistant", "status": "incomplete", "content": "Let"}
    assert chat_of_items(asked(input=[*HISTORY, cut]), []).continue_final_message
    assert not chat_of_items(asked(input=[cut, *HISTORY]), []).continue_final_message


def test_fields_become_those_of_the_chat() -> None:
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    chat = chat_of_items(
        asked(
            reasoning={"effort": "low", "summary": "auto"},
            include=["message.output_text.logprobs", "reasoning.encrypted_content"],
            top_logprobs=3,
            truncation="auto",
            tool_choice={"type": "function", "name": "get_weather"},
            text={"format": schema, "verbosity": "medium"},
            temperature=0.5,
        ),
        [],
    )
    assert (chat.reasoning_effort, chat.logprobs, chat.top_logprobs, chat.temperature) == ("low", True, 3, 0.5)
    assert (chat.truncate_prompt_tokens, chat.tool_choice) == (
        -1,
        {"type": "function", "function": {"name": "get_weather"}},
    )
    said = {"name": "a", "schema": {"type": "object"}, "strict": None}
    assert chat.response_format == {"type": "json_schema", "json_schema": said}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"prompt": {"id": "a"}}, "prompt"),
        ({"include": ["all"]}, "include"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"truncation": "some"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat_of_items(asked(**fields), [])
    assert caught.value.param == param


async def test_an_answer_is_items_of_reasoning_text_and_calls() -> None:
    async with asking(writes(CALLS)) as http:
        reply = (await http.post("/v1/responses", json={**ASK, "metadata": {"a": "b"}})).json()
    reasoning, message, call = reply["output"]
    assert (reasoning["type"], reasoning["content"]) == (
        "reasoning",
        [{"type": "reasoning_text", "text": "One city."}],
    )
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    (part,) = message["content"]
    assert (part["type"], part["text"], part["annotations"]) == ("output_text", "Let me look.", [])
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "get_weather",
        {"city": "Zürich"},
    )
    assert (reply["object"], reply["status"], reply["model"]) == ("response", "completed", "fake-model")
    assert reply["id"].startswith("resp_") and (reply["metadata"], reply["store"]) == ({"a": "b"}, False)
    assert (reply["max_output_tokens"], reply["tool_choice"], reply["tools"][0]["name"]) == (500, "auto", "get_weather")
    usage = reply["usage"]
    assert usage["output_tokens"] == len(CALLS.encode()) + 1
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == len("\nOne city.\n")


async def test_a_stream_tells_of_each_item_in_openais_order() -> None:
    async with asking(writes(CALLS)) as http:
        events = events_of((await http.post("/v1/responses", json={**ASK, "stream": True})).text)
        whole = (await http.post("/v1/responses", json=ASK)).json()
    kinds = [event["type"].removeprefix("response.") for event in events]
    rows = [kind for at, kind in enumerate(kinds) if kind != kinds[at - 1]]
    assert rows == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    texts: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] = texts.get(event["output_index"], "") + event["delta"]
    assert texts == {0: "One city.", 1: "Let me look.", 2: '{"city": "Zürich"}'}
    last = events[-1]["response"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert last["output"] == done and events[0]["response"]["status"] == "in_progress"
    ids = {"id", "call_id"}
    stripped = [[{key: value for key, value in item.items() if key not in ids} for item in items]
                for items in (last["output"], whole["output"])]  # fmt: skip
    assert stripped[0] == stripped[1] and last["usage"] == whole["usage"] and last.keys() == whole.keys()


async def test_logprobs_of_a_text_that_waits_to_be_told_apart_are_not_lost() -> None:
    text = "a <tool b </ c <think d"
    async with asking(writes(text)) as http:
        asked = {**ASK, "include": ["message.output_text.logprobs"], "top_logprobs": 0}
        body = (await http.post("/v1/responses", json=asked)).json()
        events = events_of((await http.post("/v1/responses", json={**asked, "stream": True})).text)
    (part,) = body["output"][0]["content"]
    assert part["text"] == text and "".join(one["token"] for one in part["logprobs"]) == text
    pieces = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(one["token"] for event in pieces for one in event["logprobs"]) == text


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("responses", {"input": "a", "max_output_tokens": 10**9}, "max_output_tokens"),
        ("responses", {"input": "a", "stop": ["a"] * 99}, "stop"),
        ("responses", {"input": [{"role": "user", "content": "a"}] * 9000}, "input"),
        ("messages", {"max_tokens": 4, "messages": [], "stop_sequences": ["a"]}, "messages"),
    ],
)
async def test_what_is_refused_has_the_name_that_the_client_knows_it_by(path: str, fields: Any, param: str) -> None:
    async with asking(writes("a")) as http:
        error = (await http.post(f"/v1/{path}", json=fields)).json()["error"]
    assert error.get("param", param) == param and error["message"].startswith((param, "This model")), error
    async with asking(writes("a")) as http:
        asked = {"max_tokens": 4, "messages": [{"role": "user", "content": "a"}], "stop_sequences": ["a"] * 99}
        reply = (await http.post("/v1/messages", json=asked)).json()
    assert reply["error"]["message"].startswith("stop_sequences has at most")


async def test_each_of_several_calls_is_an_item() -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
    async with asking(writes(call % "Zürich" + "\n" + call % "Rome")) as http:
        events = events_of((await http.post("/v1/responses", json={**ASK, "stream": True})).text)
        alone = (await http.post("/v1/responses", json={**ASK, "parallel_tool_calls": False})).json()
    added, done = (
        [event["item"] for event in events if event["type"] == f"response.output_item.{kind}"]
        for kind in ("added", "done")
    )
    assert [item["call_id"] for item in added] == [item["call_id"] for item in done]
    said = [(item["status"], json.loads(item["arguments"])["city"]) for item in done]
    assert said == [("completed", "Zürich"), ("completed", "Rome")]
    assert [json.loads(item["arguments"])["city"] for item in alone["output"]] == ["Zürich"]


async def test_what_the_length_cuts_off_is_incomplete() -> None:
    async with asking(writes(CALLS)) as http:
        cut = {**ASK, "max_output_tokens": len(CALLS.encode()) - 20}
        reply = (await http.post("/v1/responses", json=cut)).json()
        events = events_of((await http.post("/v1/responses", json={**cut, "stream": True})).text)
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    statuses = [(item["type"], item["status"]) for item in reply["output"]]
    assert statuses[1:] == [("message", "completed"), ("function_call", "incomplete")]
    assert events[-1]["type"] == "response.incomplete"
    assert [item["status"] for item in events[-1]["response"]["output"]] == [status for _, status in statuses]


async def test_logprobs_come_with_the_text() -> None:
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "tools": []}
    async with asking(writes(ANSWER)) as http:
        reply = (await http.post("/v1/responses", json={**ASK, **more})).json()
        events = events_of((await http.post("/v1/responses", json={**ASK, **more, "stream": True})).text)
    (part,) = reply["output"][0]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == ANSWER
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"]) and reply["top_logprobs"] == 2
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]


async def test_a_decoder_that_dies_for_good_ends_a_stream_as_failed() -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.tokens, node.eos, node.die_after, node.stays_dead = writes("a" * 400), 0, 5, True
    rig = await make_rig(nodes)
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        events = events_of((await http.post("/v1/responses", json={"input": "a", "stream": True})).text)
    failed = events[-1]
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["code"] == "server_error" and failed["response"]["error"]["message"]


# --- what is kept -----------------------------------------------------------------------------------------------------


async def test_a_loop_of_tools_goes_on_from_the_answer_that_is_kept() -> None:
    kept = KeptResponses(ManualClock())
    async with asking(calls_then(CALLS, ANSWER), kept) as http:
        first = (await http.post("/v1/responses", json=ASK)).json()
        assert first["store"] and (await http.get(f"/v1/responses/{first['id']}")).json() == first
        result = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "18"}
        going_on = {**ASK, "input": [result], "previous_response_id": first["id"]}
        second = (await http.post("/v1/responses", json=going_on)).json()
        assert second["output"][0]["content"][0]["text"] == ANSWER and second["previous_response_id"] == first["id"]
        sent = [{"role": "user", "content": ASK["input"]}, *first["output"], result]
        same = (await http.post("/v1/responses", json={**ASK, "input": sent, "store": False})).json()
        assert same["usage"]["input_tokens"] == second["usage"]["input_tokens"], "the prompt is the same"
        third = {**ASK, "input": "And now?", "previous_response_id": second["id"], "stream": True}
        events = events_of((await http.post("/v1/responses", json=third)).text)
        assert (await http.get(f"/v1/responses/{events[-1]['response']['id']}")).json() == events[-1]["response"]
        assert (await http.get(f"/v1/responses/{same['id']}")).status_code == 404, "store was false"
        cancelled = await http.post(f"/v1/responses/{first['id']}/cancel")
        assert (cancelled.status_code, cancelled.json()["error"]["param"]) == (400, "response_id")
        gone = (await http.delete(f"/v1/responses/{first['id']}")).json()
        assert gone == {"id": first["id"], "object": "response", "deleted": True}
        for reply in (
            await http.get(f"/v1/responses/{first['id']}"),
            await http.delete(f"/v1/responses/{first['id']}"),
            await http.post(f"/v1/responses/{first['id']}/cancel"),
            await http.post("/v1/responses", json=going_on),
        ):
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "response_not_found")
    assert len(kept) == 2


async def test_where_nothing_is_kept_it_is_said() -> None:
    async with asking(writes(ANSWER)) as http:
        for name, value in (("store", True), ("previous_response_id", "resp_1")):
            reply = await http.post("/v1/responses", json={**ASK, name: value})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, name)
        assert (await http.get("/v1/responses/resp_1")).json()["error"]["param"] == "response_id"


async def test_an_id_that_a_client_chose_is_its_own() -> None:
    kept = KeptResponses(ManualClock())
    async with asking(writes(ANSWER), kept) as http:
        for question in ("How is it?", "And now?"):
            reply = (await http.post("/v1/responses", json={"input": question, "request_id": "mine"})).json()
            assert reply["id"] == "mine" and (await http.get("/v1/responses/mine")).json() == reply
    assert kept.put("other", "mine", b"theirs", b"[]") and len(kept) == 2
    kept.drop("other", "mine")
    assert kept.find("", "mine").body != b"theirs" and len(kept) == 1


async def test_an_id_that_no_path_can_name_is_not_kept() -> None:
    kept = KeptResponses(ManualClock())
    async with asking(writes(ANSWER), kept) as http:
        for name in ("a/b", "/", ".", ".."):
            body = {"input": "How is it?", "request_id": name}
            refused = await http.post("/v1/responses", json={**body, "store": True})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id")
            for store in ({}, {"store": False}):
                reply = (await http.post("/v1/responses", json={**body, **store})).json()
                assert (reply["id"], reply["store"], len(kept)) == (name, False, 0)
        for name in ("a.b", "a?b", "a%2Fb", "ä b", "..."):
            reply = (await http.post("/v1/responses", json={"input": "How is it?", "request_id": name})).json()
            assert (await http.get(f"/v1/responses/{quote(name, safe='')}")).json() == reply


def test_one_of_several_processes_keeps_nothing() -> None:
    lifecycle = Lifecycle(AsyncExitStack(), asyncio.TaskGroup())
    assert keep_responses(["http://other"], ManualClock(), lifecycle) is None and not lifecycle.describe
    kept = keep_responses([], ManualClock(), lifecycle)
    assert kept is not None and kept.put("a", "r", b"xx", b"y")
    assert lifecycle.describe[0]() == ["<KeptResponses 1 of 1 tenants, 3 bytes>"]


def test_what_is_kept_is_bounded_and_its_tenants_own() -> None:
    clock = ManualClock()
    kept = KeptResponses(clock, KeepLimits(max_bytes=100, max_one_bytes=50, max_count=5, max_age_s=60))
    assert kept.put("a", "r0", b"x" * 20, b"y" * 10)
    assert kept.find("a", "r0").body == b"x" * 20
    for tenant, name in (("b", "r0"), ("", "r0"), ("a", "r1")):
        with pytest.raises(ResponseNotFoundError):
            kept.find(tenant, name)
    with pytest.raises(ResponseNotFoundError):
        kept.drop("b", "r0")
    assert not kept.put("a", "long", b"x" * 51, b""), "one alone is too long"
    for number in range(1, 4):
        assert kept.put("b", f"b{number}", b"x" * 30, b"")
    assert kept.find("a", "r0"), "who keeps much loses first"
    with pytest.raises(ResponseNotFoundError):
        kept.find("b", "b1")
    for number in range(4):
        assert kept.put("a", f"s{number}", b"", b"")
    assert len(kept) == 5
    clock.advance(61)
    with pytest.raises(ResponseNotFoundError):
        kept.find("b", "b3")
    assert kept.put("c", "new", b"", b"") and len(kept) == 1
