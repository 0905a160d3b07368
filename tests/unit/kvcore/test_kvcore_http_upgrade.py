"""A request that wishes for another protocol is answered as any other: stock Java clients send one with each."""

import asyncio

import pytest
from starlette.types import Receive, Scope, Send
from support.http_wire import connected

WISH = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
SIZED = b"POST /a HTTP/1.1\r\n" + WISH + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = b"POST /a HTTP/1.1\r\n" + WISH + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
BARE = b"GET /a HTTP/1.1\r\n" + WISH + b"\r\n"
PLAIN = b"POST /b HTTP/1.1\r\nHost: x\r\nX-Name: y\r\nContent-Length: 3\r\n\r\nyou"


async def mirror(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with its path and the whole body."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message.get("body", b""), message["more_body"]
    said = scope["path"].encode() + b"=" + body
    length = (b"content-length", b"%d" % len(said))
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": said})


async def answers(*parts: bytes, count: int) -> bytes:
    """What the server writes for these parts, each received by itself, once it has answered `count` requests."""
    protocol, wire, state = connected(mirror)
    for part in parts:
        protocol.data_received(part)
        await asyncio.sleep(0)
    for _ in range(40):
        if state.total_requests == count:
            break
        await asyncio.sleep(0)
    protocol.connection_lost(None)
    return wire.sent


def ok(*said: bytes) -> bytes:
    return b"".join(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(each), each) for each in said)


@pytest.mark.parametrize(("raw", "said"), [(SIZED, b"/a=hello"), (CHUNKED, b"/a=hello"), (BARE, b"/a=")])
async def test_the_request_is_answered_wherever_it_is_cut(raw: bytes, said: bytes) -> None:
    for cut in range(len(raw)):
        parts = (raw[:cut], raw[cut:]) if cut else (raw,)
        assert await answers(*parts, count=1) == ok(said), f"cut at {cut}"


@pytest.mark.parametrize("first", [SIZED, CHUNKED, BARE])
@pytest.mark.parametrize("second", [SIZED, CHUNKED, BARE, PLAIN])
async def test_so_is_the_next_one_on_the_connection(first: bytes, second: bytes) -> None:
    said = {SIZED: b"/a=hello", CHUNKED: b"/a=hello", BARE: b"/a=", PLAIN: b"/b=you"}
    expected = ok(said[first], said[second], said[PLAIN])
    assert await answers(first, second, PLAIN, count=3) == expected, "one by one"
    assert await answers(first + second + PLAIN, count=3) == expected, "all at once"


async def test_what_follows_such_a_request_and_is_no_http_is_refused() -> None:
    sent = await answers(SIZED, b"\x00\x01\r\n\r\n", count=2)
    assert sent.startswith(ok(b"/a=hello")) and b"malformed_http" in sent


async def test_a_connect_ends_with_an_error_and_not_in_a_loop() -> None:
    assert b" 400 " in await answers(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n", count=1)


async def test_a_client_that_waits_for_leave_to_send_its_body_gets_it() -> None:
    head, _, body = SIZED.partition(b"\r\n\r\n")
    parts = (head + b"\r\nExpect: 100-continue\r\n\r\n", body)
    assert await answers(*parts, count=1) == b"HTTP/1.1 100 Continue\r\n\r\n" + ok(b"/a=hello")
