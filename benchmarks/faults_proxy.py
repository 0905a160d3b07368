"""A way to one HTTP server that can be made to hurt: errors, hangs, slow streams, late probes. In this process.

What a network or a sick process does to a node's API, without a fault built into the node. Bodies pass as they are.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web

from benchmarks.faults_cells import SLOW_STEP_S
from kvcore.process.http_client import http_session

PROBES = ("/v1/info", "/health", "/v1/models", "/metrics")
LATE_S = 2.5
_HOP = {"transfer-encoding", "connection", "keep-alive", "content-length"}


class Proxy:
    """`fault`: a kind of benchmarks.faults_cells, or empty. `held`: requests of clients that hang here now; the router
    has one of its own at a node that it suspects."""

    def __init__(self, target: str, session: aiohttp.ClientSession) -> None:
        self.fault = ""
        self.held = 0
        self.url = ""
        self._target, self._session = target, session
        self._healed = asyncio.Event()

    def heal(self) -> None:
        """What hangs goes on."""
        self.fault = ""
        self._healed.set()
        self._healed = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request of whoever takes this for the server."""
        probe, fault = request.path in PROBES, self.fault
        if fault == "late" and probe:
            await asyncio.sleep(LATE_S)
        if fault == "error" and not probe:
            return web.Response(status=500, text="the node has a fault")
        if fault == "hang" and not probe:
            of_client = b"trial-" not in await request.read()
            self.held += of_client
            try:
                await self._healed.wait()
            finally:
                self.held -= of_client
        return await self._pass_on(request, SLOW_STEP_S if fault == "slow" and not probe else 0.0)

    async def _pass_on(self, request: web.Request, step_s: float) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        url, body = self._target + request.path_qs, await request.read()
        try:
            async with self._session.request(request.method, url, data=body or None, headers=headers) as reply:
                kept = {name: value for name, value in reply.headers.items() if name.lower() not in _HOP}
                answer = web.StreamResponse(status=reply.status, headers=kept)
                await answer.prepare(request)
                async for piece in _frames(reply) if step_s else reply.content.iter_any():
                    await asyncio.sleep(step_s)
                    await answer.write(piece)
                await answer.write_eof()
                return answer
        except (aiohttp.ClientError, ConnectionError):
            if request.transport is not None:
                request.transport.abort()  # as the server's end looks to its caller
            raise


async def _frames(reply: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """A body in the frames of the nodes' streams, each a token or a few; what is no such stream in one piece."""
    rest = b""
    async for piece in reply.content.iter_any():
        rest += piece
        while len(rest) > 4 and len(rest) >= (end := 4 + int.from_bytes(rest[:4], "little")):
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


@asynccontextmanager
async def proxy_to(target: str) -> AsyncIterator[Proxy]:
    """On a free port of this machine."""
    async with http_session(connector=aiohttp.TCPConnector(limit=0)) as session:
        proxy = Proxy(target, session)
        async with serving(proxy.handle) as url:
            proxy.url = url
            yield proxy


@asynccontextmanager
async def serving(handle: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """Every request goes to `handle`, which is cancelled when its client leaves. The URL."""
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
