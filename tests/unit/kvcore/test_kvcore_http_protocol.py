"""What is not a whole HTTP request gets a JSON error and a closed connection, and never harms an answer under way."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.types import Receive, Scope, Send

from kvcore.process.asgi import AsgiServer
from kvcore.process.limits import HttpLimits

POST = b"POST / HTTP/1.1\r\nHost: x\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers at once on /early (in two parts), else once the body is there."""
    if scope["type"] != "http":
        return
    started = {"type": "http.response.start", "status": 200, "headers": []}
    if scope["path"] == "/early":
        await send(started)
        await send({"type": "http.response.body", "body": b"early", "more_body": True})
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        more = message["more_body"]
    if scope["path"] != "/early":
        await send(started)
    await send({"type": "http.response.body", "body": b"done"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with serving(HttpLimits()) as port:
        yield port


@asynccontextmanager
async def serving(limits: HttpLimits) -> AsyncIterator[int]:
    server = AsgiServer(echo, "127.0.0.1", 0, limits=limits)
    await server.start()
    yield server.port
    await server.aclose()


async def talk(port: int, *parts: bytes, half_close: bool = False) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(60):
            for part in parts:
                writer.write(part)
                await writer.drain()
            if half_close:
                writer.write_eof()
            return await reader.read()
    finally:
        writer.close()


def error_of(answer: bytes, status: int, kind: str = "invalid_request_error") -> dict[str, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"connection: close" in head and b"application/json" in head
    error: dict[str, str] = json.loads(body)["error"]
    assert error["type"] == kind and error["message"]
    return error


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100,  # a TLS client
        b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_is_answered_with_a_json_error(port: int, raw: bytes):
    assert error_of(await talk(port, raw), 400)["code"] == "malformed_http"


@pytest.mark.parametrize("framing", [b"Content-Length: 100\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc"])
async def test_a_body_that_is_cut_short_is_answered_and_closed(port: int, framing: bytes):
    assert "cut short" in error_of(await talk(port, POST + framing, half_close=True), 400)["message"]


async def test_a_head_that_is_cut_short_is_answered_and_closed(port: int):
    assert "cut short" in error_of(await talk(port, POST, half_close=True), 400)["message"]


async def test_a_head_without_end_is_refused_at_its_bound(port: int):
    error = error_of(await talk(port, POST + b"X-Long: ", b"a" * (HttpLimits().max_head_bytes + 1)), 431)
    assert str(HttpLimits().max_head_bytes) in error["message"]


async def test_a_head_that_never_ends_is_given_up():
    async with serving(HttpLimits(head_s=0.05)) as port:
        assert "0.05 s" in error_of(await talk(port, b"GET / HT"), 408)["message"]
        assert await talk(port) == b"", "a client that never speaks is closed without a word"


async def test_a_second_head_is_bounded_as_the_first():
    async with serving(HttpLimits(head_s=0.05)) as port:
        answer = await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT")
    first, _, rest = answer.partition(b"done\r\n0\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 ")
    error_of(rest, 408)


async def test_garbage_after_the_answer_has_begun_ends_it_and_adds_nothing(port: int):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(60):
        writer.write(b"POST /early HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert (await reader.readuntil(b"early")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"zz\r\n")
        assert await reader.read() == b"\r\n"
    writer.close()


async def test_a_wish_to_upgrade_is_served_as_plain_http(port: int):
    raw = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    async with asyncio.timeout(60):
        assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200 ")
    writer.close()


async def test_connections_over_the_bound_are_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    get = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with serving(HttpLimits(max_connections=2)) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for reader, writer in held:
            writer.write(get)
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")
        with caplog.at_level(logging.WARNING):
            answer = await talk(port, POST + b"Content-Length: 3\r\n\r\n", b"abc")
        error = error_of(answer, 503, "server_error")
        assert error["code"] == "overloaded" and "takes 2 connections" in error["message"]
        assert b"retry-after: 1" in answer
        assert sum("refused status=503" in line for line in caplog.messages) == 1
        held[1][1].write(get)
        assert (await held[1][0].readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200"), "who came before is served"
        held[0][1].close()
        await held[0][1].wait_closed()
        async with asyncio.timeout(60):
            while b" 200 " not in await talk(port, get.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")):
                pass
        held[1][1].close()
