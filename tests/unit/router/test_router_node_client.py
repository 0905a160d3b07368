"""The HTTP client of nodes against real sockets: lies, breaks, refusals, deadlines; then the plain case."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from aiohttp import web
from support.delta_readers import deltas_of
from support.router_fakes import FakeNode, expected, node_app, serve, until

from kvcore.errors import DeadlineExceededError, EngineError, KVFerryError, NodeUnavailableError, OverloadedError
from kvcore.types import Role
from nodeapi.client import HttpNodeClient
from nodeapi.frames import pack_frame
from nodeapi.messages import GenerateRequest, PrefillRequest, TokenDelta, TokenLogprob
from nodeapi.sampling import SamplingParams

CALL_S = 20.0
PREFILL = PrefillRequest(request_id="a", prompt_token_ids=[1, 2, 3], deadline_s=5)
GENERATE = GenerateRequest(
    request_id="b", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=4), deadline_s=5
)


def frame(delta: TokenDelta) -> bytes:
    return pack_frame(msgspec.msgpack.encode(delta))


@pytest.fixture
async def client() -> HttpNodeClient:
    return HttpNodeClient(connect_timeout_s=CALL_S, max_connections=10)


async def read(client: HttpNodeClient, url: str) -> list[TokenDelta]:
    return await deltas_of(client, url, GENERATE, CALL_S)


def app_that(answers: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.Application:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answers)
    return app


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff\xff\xff",
        b"\x04\x00\x00\x00abcd",
        b"\x40\x00\x00\x00short",
        b"\x01\x00\x00\x00\x80",
        frame(TokenDelta(token_ids=[-1])),
        frame(TokenDelta(token_ids=[5], logprobs=[TokenLogprob(logprob=-1.0, top=[(1 << 32, -1.0)])])),
    ],
    ids=["huge frame", "garbage", "cut off", "wrong shape", "no token", "no token's logprob"],
)
async def test_a_stream_that_breaks_the_format_is_an_unavailable_node(client: HttpNodeClient, body: bytes) -> None:
    async def answers(request: web.Request) -> web.Response:
        return web.Response(body=body)

    async with serve(app_that(answers)) as url:
        with pytest.raises(NodeUnavailableError):
            await read(client, url)
    await client.aclose()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (500, b"oops", EngineError),
        (503, b'{"error":{"code":"overloaded","message":"full","retryable":true}}', OverloadedError),
        (500, b'{"error":{"code":"of another version","message":"x","retryable":true}}', EngineError),
        (200, b"not a result", NodeUnavailableError),
    ],
)
async def test_refusals_become_errors_of_ours(
    client: HttpNodeClient, status: int, body: bytes, kind: type[KVFerryError]
) -> None:
    async def answers(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    async with serve(app_that(answers)) as url:
        with pytest.raises(kind):
            await client.prefill(url, PREFILL, timeout_s=CALL_S)
    await client.aclose()


async def test_nobody_there_and_nothing_said(client: HttpNodeClient) -> None:
    async def answers(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(NodeUnavailableError):
        await client.prefill("http://127.0.0.1:1", PREFILL, timeout_s=CALL_S)
    async with serve(app_that(answers)) as url:
        with pytest.raises(DeadlineExceededError):
            await client.prefill(url, PREFILL, timeout_s=0.5)
    await client.aclose()


async def test_a_node_that_dies_in_the_middle_is_unavailable(client: HttpNodeClient) -> None:
    node = FakeNode("d0", Role.DECODER, die_after=2)
    async with serve(node_app(node)) as url:
        with pytest.raises(NodeUnavailableError):
            await read(client, url)
    await client.aclose()


async def test_closing_a_stream_early_reaches_the_node(client: HttpNodeClient) -> None:
    node = FakeNode("d0", Role.DECODER, generate_gate=asyncio.Event())
    async with serve(node_app(node)) as url:
        reading = asyncio.ensure_future(read(client, url))
        await until(lambda: node.running == 1)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: node.running == 0)
    await client.aclose()


async def test_every_call_arrives_and_its_answer_comes_back(client: HttpNodeClient) -> None:
    node = FakeNode("d0", Role.DECODER)
    async with serve(node_app(node)) as url:
        assert (await client.prefill(url, PREFILL, timeout_s=CALL_S)).request_id == "a"
        tokens = [token for delta in await read(client, url) for token in delta.token_ids]
        assert tokens == expected([1, 2, 3], 4)
        assert (await client.info(url, timeout_s=CALL_S)).node.id == "d0"
        await client.end_handoff(url, "b", timeout_s=CALL_S)
        await client.abort(url, "b", timeout_s=CALL_S)
        assert (node.handoffs_ended, node.aborted) == (["b"], ["b"])
    await client.aclose()


async def test_a_client_says_whether_it_is_connected(client: HttpNodeClient) -> None:
    assert repr(client) == "<HttpNodeClient over <HttpPool 0 calls, at most 10, 0 idle connections>>"
    async with serve(node_app(FakeNode("d0", Role.DECODER))) as url:
        await client.info(url, timeout_s=CALL_S)
        assert "0 calls, at most 10, 1 idle connections" in repr(client)
    await client.aclose()
