"""Requests as clients and browsers write them: slashes at the end, HEAD, preflights; errors by which libraries know."""

import json
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime

import httpx
import pytest
from support.http_wire import connected
from support.router_fakes import MAX_CONTEXT, Rig, make_rig, until

from kvcore.process.asgi import AsgiServer
from router.api.front import Cors

ASK = {"model": "fake-model", "prompt": "hello" * 20, "max_tokens": 4}
CHAT = {"model": "fake-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


@pytest.fixture
async def rig() -> Rig:
    return await make_rig()


def client(rig: Rig) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://router")  # type: ignore[arg-type]


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    async with client(rig) as http:
        yield http


async def test_a_slash_at_the_end_changes_nothing(http: httpx.AsyncClient) -> None:
    for path, body in (("/v1/completions/", ASK), ("/v1/chat/completions/", CHAT)):
        reply = await http.post(path, json=body)
        assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 4)
    for path in ("/v1/models/", "/v1/models/fake-model/", "/health/", "/v1/cluster/", "/openapi.json/"):
        assert (await http.get(path)).status_code == 200
    metrics = (await http.get("/metrics/")).text
    assert 'endpoint="/v1/completions",status="200"' in metrics, "and it is the same endpoint"
    assert (await http.get("/")).status_code == (await http.get("/v1/")).status_code == 404


async def test_health_says_what_time_it_is_here(http: httpx.AsyncClient) -> None:
    """Clocks are compared by it."""
    said = parsedate_to_datetime((await http.get("/health")).headers["Date"])
    assert abs(said.timestamp() - time.time()) < 60


async def test_head_is_get_without_the_body(rig: Rig) -> None:
    server = AsgiServer(rig.app, "127.0.0.1", 0)
    await server.start()
    async with httpx.AsyncClient(base_url=server.url) as http:
        for path in ("/health", "/v1/models", "/v1/models/fake-model", "/v1/cluster", "/v1/requests", "/openapi.json"):
            head, get = await http.head(path), await http.get(path)
            assert (head.status_code, head.content) == (get.status_code, b"") == (200, b""), path
            assert head.headers["content-type"] == get.headers["content-type"]
        assert (await http.head("/metrics")).status_code == 200
        assert (await http.head("/v1/completions")).status_code == 405
        assert (await http.head("/nowhere")).status_code == 404
    await server.aclose()


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://127.8.9.1:80", True),
        ("http://[::1]:5173", True),
        ("http://app.localhost", True),
        ("http://app.example", False),
        ("http://localhost.app.example", False),
        ("http://127.0.0.1.app.example:80", False),
        ("http://localhost:3000/x", False),
        ("null", False),
    ],
)
async def test_pages_of_this_machine_may_read_answers_and_others_not(
    http: httpx.AsyncClient, origin: str, allowed: bool
) -> None:
    preflight = await http.options("/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})
    assert preflight.status_code == (200 if allowed else 403) and preflight.headers["x-request-id"]
    reply = await http.post("/v1/completions", json=ASK, headers={"Origin": origin})
    wrong = await http.post("/v1/completions", json={}, headers={"Origin": origin})
    assert (reply.status_code, wrong.status_code) == (200, 400)
    for answer in (preflight, reply, wrong):
        assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
    if not allowed:
        error = preflight.json()["error"]
        assert error["code"] == "origin_not_allowed"
        assert "router.cors" in error["message"] and origin in error["message"]
    else:
        assert preflight.content == b""
        assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["vary"] == reply.headers["vary"] == "Origin"
        assert "X-Request-Id" in reply.headers["access-control-expose-headers"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_what_a_browser_sends_without_asking_is_not_worked_on(
    rig: Rig, http: httpx.AsyncClient, kind: str | None
) -> None:
    """A page's script may post anything but JSON to any server; only the answer is kept from it."""
    content = json.dumps(ASK)
    headers = {"Content-Type": kind} if kind else {}
    refused = await http.post("/v1/completions", content=content, headers={**headers, "Origin": "http://app.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert rig.log.total == 0
    as_json = {"Origin": "http://app.example", "Content-Type": "application/json; charset=utf-8"}
    for more in ({}, {"Origin": "http://localhost:3000"}, as_json):
        reply = await http.post("/v1/completions", content=content, headers={**headers, **more})
        assert reply.status_code == 200, "no browser, or one that has asked"


@pytest.mark.parametrize(
    ("origins", "told"),
    [(["*"], "*"), (["http://app.example"], "http://app.example"), (["http://other.example"], None), ([], None)],
)
async def test_who_may_is_set_in_the_cluster_file(origins: list[str], told: str | None) -> None:
    async with client(await make_rig(cors=origins)) as http:
        asked = {"Origin": "http://app.example", **PREFLIGHT, "Access-Control-Request-Private-Network": "true"}
        preflight = await http.options("/v1/completions/", headers=asked)
        reply = await http.post("/v1/completions", json={**ASK, "stream": True}, headers={"Origin": asked["Origin"]})
        for answer in (preflight, reply):
            assert answer.headers.get("access-control-allow-origin") == told
        assert preflight.headers.get("access-control-allow-private-network") == ("true" if told else None)
        assert "[DONE]" in reply.text
        assert "access-control-allow-origin" not in (await http.get("/v1/models")).headers, "no page asked"
        plain = await http.options("/v1/models", headers={"Origin": asked["Origin"]})
        assert plain.status_code == 405, "no preflight"


async def test_cors_leaves_other_scopes_alone() -> None:
    seen: list[str] = []

    async def app(scope: object, receive: object, send: object) -> None:
        seen.append(scope["type"])  # type: ignore[index]

    await Cors(app, ["*"])({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]


@pytest.mark.parametrize("more", [{"prompt": "x" * (MAX_CONTEXT + 1)}, {"max_tokens": 100_000}])
async def test_a_request_that_is_too_long_is_known_by_its_words_and_its_code(
    http: httpx.AsyncClient, more: dict[str, object]
) -> None:
    """LiteLLM falls back to a model with more context by these words; openai's client shows the code."""
    reply = await http.post("/v1/completions", json={**ASK, **more})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
    assert f"this model's maximum context length is {MAX_CONTEXT} tokens" in error["message"].lower()


async def test_a_packed_body_is_refused_by_the_name_of_its_coding(http: httpx.AsyncClient) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = await http.post(path, content=b"x", headers={"Content-Encoding": "gzip"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert "gzip" in reply.json()["error"]["message"] and reply.headers["connection"] == "close"
    plain = await http.post("/v1/completions", json=ASK, headers={"Content-Encoding": "identity"})
    assert plain.status_code == 200


@pytest.mark.parametrize(
    ("path", "more", "says"),
    [
        (b"/v1/completions", b"", b""),
        (b"/v1/completions/", b"", b""),
        (b"/v1/completions", b"Origin: http://localhost\r\n", b"access-control-allow-origin: http://localhost"),
    ],
)
async def test_an_answer_has_its_id_and_is_counted_once_whatever_way_it_goes(
    path: bytes, more: bytes, says: bytes
) -> None:
    rig, body = await make_rig(cors=["loopback"]), json.dumps(ASK).encode()
    protocol, wire, state = connected(rig.app)
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n%bContent-Length: %d\r\n\r\n"
    protocol.data_received(head % (path, more, len(body)) + body)
    await until(lambda: state.total_requests == 1)
    found, _, answer = wire.sent.partition(b"\r\n\r\n")
    assert found.count(b"x-request-id: mine") == 1 and says in found
    assert json.loads(answer)["usage"]["completion_tokens"] == 4
    assert (len(wire.writes), b"access-control" in found) == (1, bool(says))
    shown = (await rig.view.metrics()).decode()
    assert 'endpoint="/v1/completions",status="200"} 1.0' in shown
