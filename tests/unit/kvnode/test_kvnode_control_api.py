"""The control API over real sockets with a fake engine: bad input, errors, streams, clients that leave, drain."""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import msgspec
import pytest
from aiohttp import ClientConnectionResetError, web
from support.fake_engine import FakeEngine, generate_request, prefill_request
from support.probe import probe_report

from kvcore.chunk_keys import adapted_salt, adapter_identity
from kvcore.errors import InvalidRequestError, ModelChangedError, NodeUnavailableError, OverloadedError
from kvcore.types import NodeInfo, Role
from kvnode.control_api import MSGPACK, ControlApi
from kvnode.limits import NodeLimits
from kvnode.request_check import parse_request
from kvnode.tiers.node_tiers import NodeTiers
from nodeapi.adapters import ServedAdapter
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.frames import FrameDecoder
from nodeapi.messages import (
    EngineInfo,
    GenerateRequest,
    LegInfo,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    ProbeReport,
    ProbeRequest,
    PromoteReply,
    StreamError,
    StreamFrame,
    TokenDelta,
)
from nodeapi.sampling import SamplingParams
from nodeapi.upkeep import WeightsRequest

INFO = NodeInfo(id="p0", role=Role.PREFILLER, control_url="http://x", incarnation=1)


class Rig:
    def __init__(self, session: aiohttp.ClientSession, api: ControlApi, engine: FakeEngine, url: str) -> None:
        self.session, self.api, self.engine, self.url = session, api, engine, url
        self.down = False

    async def post(self, path: str, body: bytes | msgspec.Struct) -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
        async with self.session.post(self.url + path, data=data) as response:
            return response.status, await response.read()

    async def until_idle(self) -> None:
        async with asyncio.timeout(60):
            while self.engine.active:  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0)

    async def until_active(self) -> None:
        async with asyncio.timeout(60):
            while not self.engine.active:  # noqa: ASYNC110
                await asyncio.sleep(0)


@asynccontextmanager
async def serving(max_body_bytes: int = 1 << 20, limits: NodeLimits = NodeLimits()) -> AsyncIterator[Rig]:
    engine = FakeEngine()
    rig: Rig

    def current() -> FakeEngine:
        if rig.down:
            raise NodeUnavailableError("the node's engine is starting")
        return engine

    async def report() -> NodeReport:
        return NodeReport(node=INFO, engine=engine.info, stats=await engine.stats())

    async def metrics() -> bytes:
        return b"kvferry_node_ready 1\n"

    async def probe(request: ProbeRequest) -> ProbeReport:
        if request.peer == "busy":
            raise OverloadedError("node p0 is measuring already; ask again when that is over")
        return probe_report(peer=request.peer)

    api = ControlApi(
        engine=current,
        report=report,
        metrics=metrics,
        health=lambda: "starting" if rig.down else None,
        probe=probe,
        max_body_bytes=max_body_bytes,
        limits=limits,
    )
    runner = api.runner()
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession(headers={"Accept": MSGPACK}) as session:
            rig = Rig(session, api, engine, f"http://127.0.0.1:{port}")
            yield rig
    finally:
        await runner.cleanup()


def error_code(body: bytes) -> str:
    code: str = msgspec.msgpack.decode(body)["error"]["code"]
    return code


def frames(body: bytes) -> list[StreamFrame]:
    decoder = FrameDecoder()
    payloads = decoder.feed(body)
    assert decoder.at_boundary
    return [msgspec.msgpack.decode(payload, type=StreamFrame) for payload in payloads]


def altered(**fields: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.to_builtins(generate_request()) | fields)


def sampled(**fields: object) -> bytes:
    return altered(sampling=msgspec.to_builtins(SamplingParams(max_tokens=4)) | fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1garbage",
        b"\x81",
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"request_id": "x"}),
        altered(request_id=""),
        altered(request_id="x" * 300),
        altered(prompt_token_ids=[]),
        altered(prompt_token_ids=["a"]),
        altered(prompt_token_ids=[-1]),
        altered(prompt_token_ids=[1000]),
        altered(prompt_token_ids=[2**63]),
        altered(output_token_ids=[5000]),
        altered(deadline_s=0.0),
        altered(deadline_s=float("nan")),
        altered(deadline_s=1e9),
        altered(unknown_field=1),
        altered(handoff={"num_chunks": -1, "wait_s": 1.0}),
        sampled(max_tokens=0),
        sampled(n=0),
        sampled(n=10_000),
        sampled(temperature=float("inf")),
        sampled(temperature=-1.0),
        sampled(top_p=0.0),
        sampled(top_k=-1),
        sampled(repetition_penalty=0.0),
        sampled(logprobs=-1),
        sampled(logit_bias={5000: 1.0}),
        sampled(logit_bias={1: float("nan")}),
        sampled(stop_token_ids=[-5]),
        b"\xa2\xff\xfe",
    ],
)
async def test_bad_body_is_a_400_and_never_reaches_the_engine(body: bytes) -> None:
    async with serving() as rig:
        status, answer = await rig.post("/v1/generate", body)
        assert (status, error_code(answer)) == (400, "invalid_request_error")
        assert rig.engine.deltas_out == 0


async def test_body_over_the_bound_is_a_413() -> None:
    async with serving(max_body_bytes=1000) as rig:
        status, answer = await rig.post("/v1/prefill", b"x" * 5000)
        assert (status, error_code(answer)) == (413, "payload_too_large")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/v1/prefill", 405)])
async def test_unknown_route_or_method_has_the_error_body(method: str, path: str, status: int) -> None:
    async with serving() as rig, rig.session.request(method, rig.url + path) as response:
        assert (response.status, error_code(await response.read())) == (status, "invalid_request_error")


@pytest.mark.parametrize(
    ("request_id", "status", "code"),
    [
        ("fail:overloaded", 503, "overloaded"),
        ("fail:context_length_exceeded", 400, "context_length_exceeded"),
        ("fail:engine_died", 503, "engine_died"),
        ("bug", 500, "internal_error"),
    ],
)
async def test_failure_before_the_first_delta_is_the_status(request_id: str, status: int, code: str) -> None:
    async with serving() as rig:
        for path, body in (
            ("/v1/prefill", prefill_request(request_id)),
            ("/v1/generate", generate_request(request_id)),
        ):
            answered, answer = await rig.post(path, body)
            assert (answered, error_code(answer)) == (status, code)


async def test_failure_after_the_first_delta_is_the_last_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as rig:
        normal = rig.engine.generate

        async def failing(request: object) -> AsyncIterator[TokenDelta]:
            async for delta in normal(generate_request()):
                yield delta
                raise NodeUnavailableError("gone")

        monkeypatch.setattr(rig.engine, "generate", failing)
        status, body = await rig.post("/v1/generate", generate_request())
        first, last = frames(body)
        assert status == 200
        assert isinstance(first, TokenDelta)
        assert last == StreamError(code="node_unavailable", message="gone", retryable=True)
        assert rig.api.ended["generate", "node_unavailable"] == 1


async def test_engine_that_is_down_is_said_at_once() -> None:
    async with serving() as rig:
        rig.down = True
        status, answer = await rig.post("/v1/generate", generate_request())
        assert (status, error_code(answer)) == (503, "node_unavailable")
        async with rig.session.get(rig.url + "/health") as response:
            assert response.status == 503


async def test_what_both_kinds_of_legs_computed_is_told_to_the_tiers() -> None:
    told = list[PrefillResult | LegInfo]()

    async def before_leg(request: msgspec.Struct) -> tuple[msgspec.Struct, PromoteReply]:
        return request, PromoteReply()

    async with serving() as rig:
        rig.api._tiers = cast("NodeTiers", SimpleNamespace(before_leg=before_leg, after_leg=told.append))
        await rig.post("/v1/prefill", prefill_request(num_tokens=33))
        await rig.post("/v1/generate", generate_request())
    assert [(type(one), one.computed_tokens) for one in told] == [(PrefillResult, 33), (LegInfo, 3)]


async def test_prefill_stream_info_health_and_metrics_are_answered() -> None:
    async with serving() as rig:
        status, body = await rig.post("/v1/prefill", prefill_request())
        assert status == 200
        assert msgspec.msgpack.decode(body, type=PrefillResult).stored_chunks == 2
        status, body = await rig.post("/v1/generate", generate_request())
        deltas = frames(body)
        assert [t for d in deltas if isinstance(d, TokenDelta) for t in d.token_ids] == list(range(8))
        said = [d.info.fingerprint for d in deltas if isinstance(d, TokenDelta) and d.info is not None]
        assert said == [rig.engine.info.kv_spec.fingerprint], "a stream says which engine it comes from"
        async with rig.session.get(rig.url + "/v1/info") as response:
            assert msgspec.msgpack.decode(await response.read(), type=NodeReport).engine == rig.engine.info
        async with rig.session.get(rig.url + "/health") as response:
            assert response.status == 200
        async with rig.session.get(rig.url + "/metrics") as response:
            assert b"kvferry_node_ready" in await response.read()
        assert await rig.post("/v1/requests/abc/end_handoff", b"") == (204, b"")
        assert rig.engine.handoffs_ended == ["abc"]
        async with rig.session.delete(rig.url + "/v1/requests/abc") as response:
            assert response.status == 204
        assert dict(rig.api.ended) == {("prefill", "ok"): 1, ("generate", "ok"): 1}


def spans(*spans: tuple[int, int], **fields: object) -> dict[str, object]:
    return {"header": 1, "spans": list(spans), **fields}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (spans(), "there are none"),
        (spans((0, 2)), r"spans\[0\]"),
        (spans((1, 2), (1, 3)), r"spans\[1\]"),
        (spans((1, 4)), r"spans\[0\]"),
        (spans((2, 2)), r"spans\[0\]"),
        (spans((1, 2), header=4), "header"),
        (spans((1, 2), k=-1), "k: must not be negative"),
        (spans(*[(1, 2)] * 1025), "1024 at most"),
    ],
)
def test_documents_that_do_not_fit_the_prompt_are_named(said: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        parse_request(altered(prompt_token_ids=[1, 2, 3], documents=said), GenerateRequest, takes_documents())


def takes_documents() -> EngineInfo:
    return msgspec.structs.replace(FakeEngine().info, refuses_documents="")


@pytest.mark.parametrize("fields", [{"documents": spans((1, 2))}, {"reuse": False}])
def test_an_engine_that_takes_no_documents_is_asked_for_none_and_the_reason_is_told(fields: dict[str, object]) -> None:
    body = altered(prompt_token_ids=[1, 2, 3], **fields)
    assert parse_request(body, GenerateRequest, takes_documents()).prompt_token_ids == [1, 2, 3]
    for reason, info in [
        ("knows no documents", FakeEngine().info),  # an engine that does not speak of them
        ("sliding", msgspec.structs.replace(FakeEngine().info, refuses_documents="layers have a sliding window")),
    ]:
        with pytest.raises(InvalidRequestError, match=reason) as refused:
            parse_request(body, GenerateRequest, info)
        assert refused.value.param == next(iter(fields))


@pytest.mark.parametrize("kind", [PrefillRequest, GenerateRequest])
def test_a_request_for_an_adapter_that_is_not_served_goes_elsewhere(
    kind: type[PrefillRequest | GenerateRequest],
) -> None:
    served, other = (ServedAdapter(name="a", identity=adapter_identity("a", files)) for files in (b"1", b"2"))
    info = msgspec.structs.replace(FakeEngine().info, adapters=[served])

    def parsed(salt: bytes) -> PrefillRequest | GenerateRequest:
        fields: dict[str, Any] = {"sampling": SamplingParams(max_tokens=1)} if kind is GenerateRequest else {}
        request = kind(request_id="r", prompt_token_ids=[1], cache_salt=salt, deadline_s=1.0, **fields)
        return parse_request(msgspec.msgpack.encode(request), kind, info)

    for salt in (b"", b"tenant", b"kva1.short", adapted_salt(served.identity, b"tenant")):
        assert parsed(salt).cache_salt == salt
    with pytest.raises(ModelChangedError, match=rf"{other.identity} is not served by this node .*it has a$"):
        parsed(adapted_salt(other.identity, b""))


async def test_a_comparison_is_the_engines_and_a_leg() -> None:
    wanted = CompareRequest(request_id="c", prompt_token_ids=[1], deadline_s=1.0)
    async with serving() as rig:
        assert (await rig.post("/v1/compare", wanted))[0] == 400
        rig.engine.info = takes_documents()
        for num_tokens in (0, 65):
            assert (await rig.post("/v1/compare", msgspec.structs.replace(wanted, num_tokens=num_tokens)))[0] == 400
        status, body = await rig.post("/v1/compare", wanted)
        assert (status, msgspec.msgpack.decode(body, type=CompareReply).kl) == (200, [0.5])
        assert rig.api.ended["compare", "ok"] == 1


@pytest.mark.parametrize("path", ["/v1/prefill", "/v1/generate"])
async def test_client_that_leaves_while_waiting_ends_its_leg(path: str) -> None:
    async with serving() as rig:
        body = prefill_request("hang") if path == "/v1/prefill" else generate_request("hang")
        task = asyncio.create_task(rig.post(path, body))
        await rig.until_active()
        task.cancel()
        await rig.until_idle()


async def test_client_that_leaves_mid_stream_ends_its_leg() -> None:
    async with serving() as rig:
        body = msgspec.msgpack.encode(generate_request("slow", max_tokens=1_000_000))
        response = await rig.session.post(rig.url + "/v1/generate", data=body)
        await response.content.readexactly(4)
        assert rig.engine.active == {"slow"}
        response.close()
        await rig.until_idle()
        assert rig.engine.aborted == 1


async def test_client_that_left_before_a_write_is_no_error_of_the_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as rig:
        request = generate_request("slow", max_tokens=10_000)
        async with rig.session.post(rig.url + "/v1/generate", data=msgspec.msgpack.encode(request)) as response:
            await response.content.readany()

            async def gone(self: web.StreamResponse, data: bytes) -> None:
                response.close()
                raise ClientConnectionResetError("Cannot write to closing transport")

            monkeypatch.setattr(web.StreamResponse, "write", gone)
            await rig.until_idle()
        assert rig.api.ended["generate", "cancelled"] == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text


async def test_draining_refuses_new_legs_and_lets_running_ones_finish() -> None:
    async with serving() as rig:
        body = msgspec.msgpack.encode(generate_request("slow", max_tokens=100))
        response = await rig.session.post(rig.url + "/v1/generate", data=body)
        draining = asyncio.create_task(rig.api.drain(10.0))
        await asyncio.sleep(0)
        status, answer = await rig.post("/v1/prefill", prefill_request())
        assert (status, error_code(answer)) == (503, "node_unavailable")
        async with rig.session.get(rig.url + "/health") as health:
            assert health.status == 503
        assert len(frames(await response.read())) == 100
        await asyncio.wait_for(draining, 60)


async def test_drain_is_bounded() -> None:
    async with serving() as rig:
        task = asyncio.create_task(rig.post("/v1/prefill", prefill_request("hang")))
        await rig.until_active()
        await asyncio.wait_for(rig.api.drain(0.05), 60)
        assert rig.engine.active
        task.cancel()
        await rig.until_idle()


async def test_while_other_weights_are_taken_over_new_legs_are_refused_and_afterwards_taken() -> None:
    async with serving() as rig:
        task = asyncio.create_task(rig.post("/v1/prefill", prefill_request("hang")))
        await rig.until_active()
        async with rig.api.quiet(0.05) as not_ended:
            assert not_ended == 1 and rig.api.draining
            status, answer = await rig.post("/v1/prefill", prefill_request())
            assert (status, error_code(answer)) == (503, "node_unavailable")
        task.cancel()
        await rig.until_idle()
        async with rig.api.quiet(5.0) as not_ended:
            assert not_ended == 0
        assert not rig.api.draining and (await rig.post("/v1/prefill", prefill_request()))[0] == 200
        assert (await rig.post("/v1/weights", WeightsRequest(version="a", wait_s=0, deadline_s=1)))[0] == 404


async def test_deadline_of_a_leg_is_kept_by_the_api_too() -> None:
    async with serving(limits=NodeLimits(late_s=0.0)) as rig:
        status, answer = await rig.post("/v1/generate", generate_request("hang", deadline_s=0.05))
        assert (status, error_code(answer)) == (504, "deadline_exceeded")
        assert not rig.engine.active


async def exchange(rig: Rig, request: bytes) -> bytes:
    """All that comes back for raw bytes, until the node closes the connection."""
    host, port = rig.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    return answer


PREFILL = b"POST /v1/prefill HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"


async def test_a_body_that_is_not_coded_as_its_head_says_is_a_400(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as rig:
        rest = b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n"
        assert (await exchange(rig, PREFILL + rest)).partition(b"\r\n")[0].endswith(b" 400 Bad Request")
    assert "control_request_failed" not in caplog.text


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd", b"Gzip, identity", b"x"])
async def test_a_packed_body_is_refused_and_never_unpacked(coding: bytes, caplog: pytest.LogCaptureFixture) -> None:
    packed = gzip.compress(bytes(1 << 20))
    rest = b"Accept: application/msgpack\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (coding, len(packed))
    async with serving() as rig:
        for path in (b"/v1/prefill", b"/v1/generate", b"/v1/probe"):
            head = PREFILL.replace(b"/v1/prefill", path)
            answer = await exchange(rig, head + rest + packed)
            assert answer.startswith(b"HTTP/1.1 415 ") and b"unsupported_media_type" in answer and coding in answer
        plain = await exchange(rig, PREFILL + b"Content-Encoding: identity\r\nContent-Length: 1\r\n\r\nx")
        assert plain.startswith(b"HTTP/1.1 400 "), "read, and no msgpack"
    assert "control_request_failed" not in caplog.text


async def test_a_wish_for_another_protocol_leaves_the_body_as_it_is() -> None:
    body = msgspec.msgpack.encode(generate_request())
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"
    raw = PREFILL.replace(b"prefill", b"generate").replace(b"Connection: close\r\n", wish)
    async with serving() as rig:
        host, port = rig.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        async with asyncio.timeout(60):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.parametrize("why", ["late", "bug"])
async def test_a_stream_that_cannot_go_on_is_broken_off_not_answered_twice(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(limits=NodeLimits(late_s=0.0)) as rig:

        async def stuck(_: object) -> AsyncIterator[TokenDelta]:
            yield TokenDelta(token_ids=[1])
            if why == "bug":
                raise ZeroDivisionError("not one of ours")
            await asyncio.Event().wait()

        monkeypatch.setattr(rig.engine, "generate", stuck)
        body = msgspec.msgpack.encode(generate_request(deadline_s=0.2))
        head = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        answer = await exchange(rig, head + body)
        assert answer.count(b"HTTP/1.1") == 1
        assert not answer.endswith(b"0\r\n\r\n")


async def test_a_measurement_is_answered_refused_when_one_runs_and_is_no_leg() -> None:
    async with serving() as rig:
        status, body = await rig.post("/v1/probe", ProbeRequest(peer="d0", timeout_s=5.0))
        assert status == 200 and msgspec.msgpack.decode(body, type=ProbeReport) == probe_report(peer="d0")
        status, body = await rig.post("/v1/probe", ProbeRequest(peer="busy", timeout_s=5.0))
        assert status == 503 and error_code(body) == "overloaded"
        for wrong in (b"", b"\xc1", msgspec.msgpack.encode({"peer": "d0"})):
            status, body = await rig.post("/v1/probe", wrong)
            assert status == 400 and error_code(body) == "invalid_request_error"
        assert not rig.api.ended and not rig.api.active


async def test_a_draining_node_measures_nothing() -> None:
    async with serving() as rig:
        await rig.api.drain(0.1)
        status, body = await rig.post("/v1/probe", ProbeRequest(peer="d0", timeout_s=5.0))
        assert status == 503 and error_code(body) == "node_unavailable"


async def test_a_person_reads_errors_in_json():
    async with serving() as rig, aiohttp.ClientSession() as browser:
        rig.down = True
        for path, status, word in (("/health", 503, "starting"), ("/v1/nothing", 404, "GET /v1/nothing: Not Found")):
            async with browser.get(rig.url + path) as reply:
                assert (reply.status, reply.content_type) == (status, "application/json")
                assert (await reply.json())["error"]["message"] == word
