"""Our two HTTP servers with one small application behind each, and a client that does not behave."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from kvcore.errors import KVFerryError
from kvcore.ports import listen
from kvcore.process.aiohttp_gate import BoundedRunner, TlsSite, check_place
from kvcore.process.aiohttp_gate import read_body as read_node_body
from kvcore.process.asgi import AsgiServer
from kvcore.process.http_body import read_body
from kvcore.process.http_gate import HttpGate
from kvcore.process.limits import HttpLimits

MAX_BODY = 1 << 20
PART = b"x" * (64 << 10)


@dataclass
class Listener:
    """One that serves. `/health`, `/echo` (posts, answered with their length), `/endless` (a stream)."""

    port: int
    gate: HttpGate
    sent_parts: int = 0
    """Of endless streams."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """An endless stream has."""

    async def talk(self, *parts: bytes, source: str = "127.0.0.1", timeout_s: float = 5.0) -> bytes:
        """All that comes back until the server closes."""
        reader, writer = await self.connect(source)
        try:
            async with asyncio.timeout(timeout_s):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def connect(self, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection from this address."""
        return await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until it does, a few seconds at most."""
        async with asyncio.timeout(60):
            while not holds():  # noqa: ASYNC110 - counters have no event
                await asyncio.sleep(0.005)


Serving = Callable[[HttpLimits], AbstractAsyncContextManager[Listener]]


@asynccontextmanager
async def uvicorn_listener(limits: HttpLimits, tls: ssl.SSLContext | None = None) -> AsyncIterator[Listener]:
    """As the router and the metadata server have it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        status, body = 200, b"ok"
        if scope["path"] == "/endless":
            await _endless(listener, receive, send)
            return
        if scope["method"] == "POST":
            try:
                body = str(len(await read_body(request, MAX_BODY))).encode()
            except KVFerryError as error:
                status, body = error.http_status, error.code.encode()
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": status, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    server = AsgiServer(app, "127.0.0.1", 0, limits=limits, tls=tls)
    listener = Listener(0, server.gate)
    await server.start()
    listener.port = server.port
    yield listener
    await server.aclose()


@asynccontextmanager
async def aiohttp_listener(limits: HttpLimits, tls: ssl.SSLContext | None = None) -> AsyncIterator[Listener]:
    """As a node has it."""

    async def echo(request: web.Request) -> web.StreamResponse:
        try:
            return web.Response(body=str(len(await read_node_body(request, MAX_BODY, 30.0))).encode())
        except KVFerryError as error:
            return web.Response(status=error.http_status, text=error.code)

    async def health(_: web.Request) -> web.StreamResponse:
        return web.Response(text="ok")

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(PART)
                listener.sent_parts += 1
        finally:
            listener.ended.set()

    @web.middleware
    async def gate(request: web.Request, handler: Callable[..., object]) -> web.StreamResponse:
        return check_place(request) or await handler(request)  # type: ignore[misc]

    app = web.Application(middlewares=[gate])
    app.add_routes([web.get("/health", health), web.get("/endless", endless), web.post("/echo", echo)])
    app.add_routes([web.get("/", health)])
    runner = BoundedRunner(app, limits, handler_cancellation=True, auto_decompress=False, access_log=None)
    await runner.setup()
    bound = listen("127.0.0.1", 0)
    listener = Listener(bound.getsockname()[1], runner.gate)
    await (web.SockSite(runner, bound) if tls is None else TlsSite(runner, bound, tls)).start()
    yield listener
    await runner.cleanup()


async def _endless(listener: Listener, receive: Receive, send: Send) -> None:
    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    left = asyncio.create_task(gone())
    try:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not left.done():
            await send({"type": "http.response.body", "body": PART, "more_body": True})
            listener.sent_parts += 1
            await asyncio.sleep(0)
    finally:
        left.cancel()
        listener.ended.set()
