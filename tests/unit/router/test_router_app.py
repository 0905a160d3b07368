"""The HTTP surface: bad input by name, exact shapes, streams, disconnects."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from starlette.types import Message
from support.router_fakes import VOCAB, FakeNode, Rig, make_rig, next_token, two_and_two, until

from kvcore.errors import NodeUnavailableError
from kvcore.process.asgi import AsgiServer
from kvcore.types import Role
from nodeapi.messages import FinishReason, TokenDelta
from router.api import app
from router.api.limits import ApiLimits
from router.requests.limits import RequestLimits

IMPATIENT = RequestLimits(patience_s=0.0, retry_pause_s=0.01)
ASK = {"model": "fake-model", "prompt": "hello" * 20, "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLING = {"role": "assistant", "content": None}
CHAT = {"model": "fake-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
async def rig() -> Rig:
    return await make_rig(limits=IMPATIENT, max_body=20_000)


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


def error_of(reply: httpx.Response) -> dict[str, object]:
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and reply.headers["x-request-id"]
    return dict(body["error"])


BAD = [
    ({"model": "other"}, 404, "model", "model_not_found"),
    ({"model": 3}, 400, "model", None),
    ({"prompt": None}, 400, "prompt", None),
    ({"prompt": []}, 400, "prompt", None),
    ({"prompt": ""}, 400, "prompt", None),
    ({"prompt": [1, "a"]}, 400, "prompt", None),
    ({"prompt": [1, -1]}, 400, "prompt", None),
    ({"prompt": [100_000]}, 400, "prompt", None),
    ({"prompt": "x" * 3000}, 400, "prompt", "context_length_exceeded"),
    ({"max_tokens": 5000}, 400, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": 2**70}, 400, "max_tokens", "context_length_exceeded"),
    ({"max_tokens": -1}, 400, "max_tokens", None),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"max_tokens": "four"}, 400, "max_tokens", None),
    ({"min_tokens": 5}, 400, "min_tokens", None),
    ({"n": 0}, 400, "n", None),
    ({"n": 129}, 400, "n", None),
    ({"prompt": ["a"] * 100, "n": 2}, 400, "n", None),
    ({"temperature": -0.1}, 400, "temperature", None),
    ({"temperature": 2.1}, 400, "temperature", None),
    ({"top_p": 0}, 400, "top_p", None),
    ({"top_k": -2}, 400, "top_k", None),
    ({"min_p": 1.5}, 400, "min_p", None),
    ({"seed": 2**63}, 400, "seed", None),
    ({"stop": [""]}, 400, "stop", None),
    ({"stop": ["a"] * 17}, 400, "stop", None),
    ({"logprobs": 21}, 400, "logprobs", None),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias", None),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias", None),
    ({"stop_token_ids": [99_999]}, 400, "stop_token_ids", None),
    ({"presence_penalty": 3}, 400, "presence_penalty", None),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", None),
    ({"prompt_logprobs": 21}, 400, "prompt_logprobs", None),
    ({"prompt_logprobs": -1}, 400, "prompt_logprobs", None),
    ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", None),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"logprob_token_ids": [1]}, 400, "logprob_token_ids", None),
    ({"logprob_token_ids": [1] * 129, "logprobs": 0}, 400, "logprob_token_ids", None),
    ({"logprob_token_ids": [VOCAB], "logprobs": 0}, 400, "logprob_token_ids", None),
    ({"logprob_token_ids": [1], "logprobs": 0, "echo": True, "max_tokens": 0}, 400, "logprob_token_ids", None),
    ({"suffix": "x"}, 400, "suffix", None),
    ({"best_of": 2}, 400, "best_of", None),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", None),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", None),
]


@pytest.mark.parametrize(("change", "status", "param", "code"), BAD, ids=lambda value: str(value)[:40])
async def test_bad_fields_are_named(
    http: httpx.AsyncClient, change: dict[str, object], status: int, param: str, code: str | None
) -> None:
    reply = await http.post("/v1/completions", json={**ASK, **change})
    error = error_of(reply)
    assert (reply.status_code, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    if code:
        assert error["code"] == code


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "tool_call_id": "c"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "c"}]}]}, "messages[0].tool_calls"),
        ({"messages": [CALLING | {"tool_calls": [{"id": "c"}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [CALLING | {"tool_calls": [{"type": "custom"}]}]}, "messages[0].tool_calls[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}], "tool_choice": "none"}, "tools[0].type"),
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
async def test_bad_chats_are_named(http: httpx.AsyncClient, change: dict[str, object], param: str) -> None:
    reply = await http.post("/v1/chat/completions", json={**CHAT, **change})
    assert (reply.status_code, error_of(reply)["param"]) == (400, param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b'{"model":"\xff"}', b"[" * 9000, b'{"a":1}x', b'"\\ud800"']
)
async def test_what_is_not_json_is_a_400(http: httpx.AsyncClient, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = await http.post(path, content=body)
        assert reply.status_code == 400 and error_of(reply)


async def test_other_failures_have_the_same_body(rig: Rig, http: httpx.AsyncClient) -> None:
    assert (await http.get("/nope")).status_code == 404
    assert error_of(await http.get("/nope"))["code"] == "unknown_route"
    assert error_of(await http.get("/v1/completions"))["code"] == "method_not_allowed"
    assert error_of(await http.get("/v1/models/x"))["code"] == "model_not_found"
    assert error_of(await http.get("/v1/requests/x"))["code"] == "unknown_request"
    reply = await http.post("/v1/completions", content=b"x" * 30_000)
    assert reply.status_code == 413 and error_of(reply)["code"] == "payload_too_large"
    for node in rig.nodes.nodes:
        node.down = True
    await rig.prober.probe()
    for reply in (await http.post("/v1/completions", json=ASK), await http.get("/health")):
        assert reply.status_code == 503 and "d0" in str(error_of(reply)["message"])
        assert reply.headers["retry-after"] == "1"
    wrong = await http.post("/v1/completions", json={**ASK, "max_tokens": -1})
    assert wrong.status_code == 400


async def test_a_body_that_does_not_come_is_the_clients_fault() -> None:
    rig = await make_rig(api_limits=ApiLimits(body_timeout_s=0.01))

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"model": '
        await asyncio.Event().wait()

    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        reply = await http.post("/v1/completions", content=slow())
    assert (reply.status_code, error_of(reply)["code"]) == (408, "body_late")
    assert error_of(reply)["type"] == "invalid_request_error" and reply.headers["connection"] == "close"


async def test_a_body_that_never_stops_is_cut_at_the_bound(http: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 4096
            yield b"x" * 4096

    assert (await http.post("/v1/completions", content=endless())).status_code == 413
    assert sent < 50_000


async def test_request_ids_are_echoed_if_sane(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/completions", json=ASK, headers={"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    for path in ("mine-1", reply.json()["id"]):
        record = (await http.get(f"/v1/requests/{path}")).json()
        assert (record["id"], record["state"], record["prompt_tokens"]) == (reply.json()["id"], "ok", 100)
        assert record["route"]["decoder"] == record["legs"][1]["node"]
        first, *others = [item for item in record["route"]["candidates"] if item["role"] == "decoder"]
        assert first["node"] == record["route"]["decoder"] and len(others) == 1
        assert first["scores"] == {"sequences": 0.0, "remote_tokens": 0.0, "tier_tokens": 0.0, "session": 0.0}
        assert first["total"] == 0.0
    (listed,) = (await http.get("/v1/requests")).json()["requests"]
    assert listed["route"]["decoder"] and listed["route"]["candidates"] == [], "a list has no explanations"
    reply = await http.get("/health", headers={"X-Request-Id": "a b" * 100})
    assert len(reply.headers["x-request-id"]) == 32


async def test_the_chat_stream_is_exactly_openais(rig: Rig, http: httpx.AsyncClient) -> None:
    ask = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 2}
    reply = await http.post("/v1/chat/completions", json=ask)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = reply.text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"] for chunk in chunks)
    assert [chunk["usage"] is None for chunk in chunks] == [True, True, True, False]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    prompt = rig.answerer.tokenizer.encode("<user>hello\n<assistant>")
    first = next_token(prompt, 0)
    second = next_token([*prompt, first], 0)
    assert deltas == [{"role": "assistant", "content": ""}, {"content": chr(first)}, {"content": chr(second)}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 2,
        "total_tokens": len(prompt) + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_an_error_in_mid_stream_is_an_event_and_no_done(rig: Rig, http: httpx.AsyncClient) -> None:
    for node in rig.nodes.nodes:
        node.die_after = 1
    reply = await http.post("/v1/completions", json={**ASK, "max_tokens": 50, "stream": True})
    events = [event for event in reply.text.split("\n\n") if event]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "node_unavailable"
    assert "[DONE]" not in reply.text and len(events) == 1 + len(rig.nodes.nodes)


async def test_an_error_before_the_first_token_is_a_status(rig: Rig, http: httpx.AsyncClient) -> None:
    for node in rig.nodes.nodes:
        node.generate_error = NodeUnavailableError("killed")
    reply = await http.post("/v1/completions", json={**ASK, "stream": True})
    assert reply.status_code == 503 and error_of(reply)["code"] == "node_unavailable"


async def test_a_stop_string_across_tokens_ends_the_text_before_it(rig: Rig, http: httpx.AsyncClient) -> None:
    text = "one two END three"
    for name in ("d0", "d1"):
        rig.nodes[name].tokens = lambda tokens, index: ord(text[len(tokens) - 100])
    for stream in (False, True):
        reply = await http.post(
            "/v1/completions", json={**ASK, "max_tokens": 15, "stop": ["END", "q"], "stream": stream}
        )
        if not stream:
            choice = reply.json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == ("one two ", "stop")
        else:
            chunks = [json.loads(event[6:]) for event in reply.text.split("\n\n")[:-2]]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two "
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    await until(lambda: all(node.running == 0 for node in rig.nodes.nodes))


async def test_a_stop_token_is_counted_but_not_shown(rig: Rig, http: httpx.AsyncClient) -> None:
    last = TokenDelta(token_ids=[98, 99], finish_reason=FinishReason.STOP, stop_token_id=99)
    rig.nodes["d0"].script = rig.nodes["d1"].script = [TokenDelta(token_ids=[97]), last]
    body = (await http.post("/v1/completions", json={**ASK, "stop_token_ids": [99]})).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("ab", "stop")
    assert body["usage"]["completion_tokens"] == 3


async def test_token_ids_come_beside_the_text_only_if_asked_for(rig: Rig, http: httpx.AsyncClient) -> None:
    raw = "é€".encode()  # a token a byte: pieces without text have token ids all the same
    last = TokenDelta(token_ids=[99], finish_reason=FinishReason.STOP, stop_token_id=99)
    rig.nodes["d0"].script = rig.nodes["d1"].script = [*(TokenDelta(token_ids=[byte]) for byte in raw), last]
    ask = {**ASK, "max_tokens": 9, "stop_token_ids": [99], "return_token_ids": True}
    (choice,) = (await http.post("/v1/completions", json=ask)).json()["choices"]
    assert (choice["text"], choice["token_ids"]) == ("é€", [*raw, 99])
    assert choice["prompt_token_ids"] == list(ASK["prompt"].encode())  # type: ignore[attr-defined]
    streamed = (await http.post("/v1/completions", json={**ask, "stream": True})).text.split("\n\n")[:-2]
    choices = [json.loads(event[6:])["choices"][0] for event in streamed]
    assert [token for part in choices for token in part["token_ids"]] == [*raw, 99]
    assert ["prompt_token_ids" in part for part in choices] == [True] + [False] * 5
    plain = (await http.post("/v1/completions", json={**ask, "return_token_ids": False})).json()
    assert plain["choices"][0].keys().isdisjoint({"token_ids", "prompt_token_ids"})


async def test_a_chats_token_ids_begin_with_the_prompts(rig: Rig, http: httpx.AsyncClient) -> None:
    prompt = rig.answerer.tokenizer.encode("<user>hello\n<assistant>")
    ask = {**CHAT, "max_tokens": 2, "return_token_ids": True}
    body = (await http.post("/v1/chat/completions", json=ask)).json()
    first = next_token(prompt, 0)
    assert body["prompt_token_ids"] == prompt
    assert body["choices"][0]["token_ids"] == [first, next_token([*prompt, first], 0)]
    streamed = (await http.post("/v1/chat/completions", json={**ask, "stream": True})).text.split("\n\n")[:-2]
    assert json.loads(streamed[0][6:])["prompt_token_ids"] == prompt
    assert json.loads(streamed[1][6:])["choices"][0]["token_ids"] == [first]


async def test_several_prompts_and_n_give_choices_in_order(http: httpx.AsyncClient) -> None:
    ask = {**ASK, "prompt": ["aa", [1, 2, 3]], "n": 2, "logprobs": 1}
    body = (await http.post("/v1/completions", json=ask)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert all(len(choice["text"]) == 4 for choice in body["choices"])
    logprobs = body["choices"][3]["logprobs"]
    assert logprobs["text_offset"] == [0, 1, 2, 3] and "".join(logprobs["tokens"]) == body["choices"][3]["text"]
    assert body["usage"]["prompt_tokens"] == 5 and body["usage"]["completion_tokens"] == 16


async def test_many_short_prompts_are_encoded_beside_the_loop_as_a_long_one_is(
    rig: Rig, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[list[int]] = []

    async def run(work: Callable[[], list[int]]) -> list[int]:
        beside.append(work())
        return beside[-1]

    monkeypatch.setattr(rig.answerer, "_run", run)
    for prompts, count in ((["x" * 1000] * 9, 9), (["x" * 1000] * 2, 0)):
        reply = await http.post("/v1/completions", json={"model": "fake-model", "prompt": prompts, "max_tokens": 1})
        assert (reply.status_code, len(beside)) == (200, count)
        beside.clear()


async def test_chat_logprobs(http: httpx.AsyncClient) -> None:
    body = (await http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 1})).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == body["choices"][0]["message"]["content"]
    assert content[0]["top_logprobs"][0]["bytes"] == list(content[0]["token"].encode())


async def test_text_parts_and_unknown_fields_are_accepted(http: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    ask = {**CHAT, "messages": [{"role": "user", "content": parts, "name": "x"}], "service_tier": "auto", "tools": []}
    joined = {**CHAT, "messages": [{"role": "user", "content": "hel\nlo"}]}
    one, two = [(await http.post("/v1/chat/completions", json=body)).json() for body in (joined, ask)]
    assert one["choices"] == two["choices"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_every_node(stream: bool) -> None:
    nodes = two_and_two()
    for name in ("p0", "p1"):
        nodes[name].prefill_gate = asyncio.Event()
    for name in ("d0", "d1"):
        nodes[name].generate_gate = asyncio.Event()
    rig = await make_rig(nodes)
    server = AsgiServer(rig.app, "127.0.0.1", 0)
    await server.start()
    async with httpx.AsyncClient(base_url=server.url) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json={**ASK, "stream": stream}))
        await until(lambda: sum(node.running for node in nodes.nodes) == 2)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: not any(node.running for node in nodes.nodes))
        await until(lambda: sum(len(node.aborted) for node in nodes.nodes) == 2)
    assert rig.log.cancelled == 1 and rig.log.in_flight == 0
    await server.aclose()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_reads_no_more_frees_every_node(stream: bool) -> None:
    rig = await make_rig(max_body=20_000, api_limits=ApiLimits(send_timeout_s=0.05))
    body = json.dumps({**ASK, "stream": stream, "max_tokens": 1000}).encode()
    arrived = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[str] = []

    async def receive() -> Message:
        return next(arrived, None) or await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Future()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    async with asyncio.timeout(60):
        await rig.app(scope, receive, send)  # type: ignore[operator]
    assert sent == ["http.response.start", "http.response.body"]
    await until(lambda: not any(node.running for node in rig.nodes.nodes))
    assert rig.log.in_flight == 0 and rig.log.cancelled == stream


async def test_status_and_metrics_tell_of_what_happened(rig: Rig, http: httpx.AsyncClient) -> None:
    rig.nodes["d0"].cached_tokens = rig.nodes["d1"].cached_tokens = 48
    await http.post("/v1/completions", json=ASK)
    status = (await http.get("/v1/cluster")).json()
    assert status["requests"]["ok"] == 1 and status["policy"] == "prefix_aware"
    assert [node["healthy"] for node in status["nodes"]] == [True] * 4
    assert (await http.get("/v1/models")).json()["data"][0]["id"] == "fake-model"
    text = (await http.get("/metrics")).text
    assert 'kvferry_router_requests_total{endpoint="/v1/completions",status="200"} 1.0' in text
    assert "kvferry_router_prompt_tokens_total 100.0" in text
    for node in rig.nodes.nodes:
        node.down = True
    assert (await http.post("/v1/completions", json=ASK)).status_code == 503
    assert 'kvferry_router_failed_total{code="node_unavailable"} 1.0' in (await http.get("/metrics")).text


def test_the_router_loads_no_bytes_and_no_model_code() -> None:
    code = (
        "import router.service, sys; print([m for m in ('torch', 'transfer', 'kvstore', 'vllm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


async def test_a_node_that_says_it_is_another_is_not_used() -> None:
    nodes = two_and_two()
    nodes.by_url["http://127.0.0.1:3"] = FakeNode("somebody", Role.DECODER)
    rig = await make_rig(nodes)
    assert "somebody" in str(rig.cluster.nodes["d0"].problem)


async def test_a_bug_before_the_answer_is_a_500_in_our_form(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(raw: bytes, kind: type) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(app, "parse", broken)
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = await http.post(path, json=ASK)
        assert (reply.status_code, error_of(reply)["code"]) == (500, "internal_error")
        assert reply.headers["x-request-id"] and "a bug" not in reply.text
