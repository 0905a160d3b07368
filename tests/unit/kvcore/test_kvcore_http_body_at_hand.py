"""A body that came with its head needs no time limit, another one does; and a caller's address is its own."""

import asyncio

import pytest
from starlette.types import Receive, Scope, Send

from kvcore.process.asgi import AsgiServer
from kvcore.process.http_body import body_at_hand

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Forwarded-For: 9.9.9.9\r\nContent-Length: 6\r\n"


@pytest.mark.parametrize(
    ("parts", "at_hand"),
    [
        ([HEAD + b"\r\nabcdef"], b"abcdef"),
        ([HEAD + b"\r\nabc", b"def"], None),
        ([HEAD + b"Expect: 100-continue\r\n\r\n", b"abcdef"], None),
    ],
)
async def test_only_a_whole_body_is_at_hand(parts: list[bytes], at_hand: bytes | None) -> None:
    found, asked, clients = list[bytes | None](), asyncio.Event(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        found.append(await body_at_hand(scope, receive))
        clients.append(scope["client"][0])
        asked.set()
        body = found[0] or b""
        while len(body) < 6:
            body += (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    server = AsgiServer(app, "127.0.0.1", 0)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    async with asyncio.timeout(60):
        writer.write(parts[0])
        await asked.wait()
        writer.writelines(parts[1:])
        answer = await reader.read()
    writer.close()
    await server.aclose()
    assert found == [at_hand] and b"abcdef" in answer
    assert clients == ["127.0.0.1"], "who asks is not what it says"
