"""A router's mock nodes with proofs, and its client, for benchmarks.trust_proofs. Run by it."""

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from benchmarks.router_mocks import CHUNK_TOKENS, ROLES, report
from kvcore.chunk_keys import usable_chunks
from kvcore.clock import SystemClock
from kvcore.config.security import SecretConfig
from kvcore.process.http_client import http_session
from kvcore.trust.http_proof import RequestVerifier
from kvcore.trust.opening import TrustSource, open_trust
from kvcore.types import Role
from kvnode.answers import ProvenCalls, frame_around
from nodeapi.messages import FinishReason, GenerateRequest, LegInfo, PrefillRequest, PrefillResult, TokenDelta

PROMPT_TOKENS = 1900
CONFIG = """
cluster: router-benchmark
model: {{path: none, name: mock}}
engine: {{kind: sim}}
nodes: {nodes}
router: {{port: 0}}
metadata_server: {{port: 1}}
"""
_Request = Callable[[int], Awaitable[None]]


def node_app(node_id: str, role: Role) -> web.Application:
    """A node that has computed everything before it is asked."""
    said = msgspec.msgpack.encode(report(node_id, role))

    async def info(_: web.Request) -> web.Response:
        return web.Response(body=said)

    async def prefill(request: web.Request) -> web.Response:
        body = msgspec.msgpack.decode(await request.read(), type=PrefillRequest)
        tokens = len(body.prompt_token_ids)
        stored = usable_chunks(tokens, CHUNK_TOKENS)
        result = PrefillResult(
            request_id=body.request_id, cached_tokens=0, computed_tokens=tokens, stored_chunks=stored
        )
        return web.Response(body=msgspec.msgpack.encode(result))

    async def generate(request: web.Request) -> web.StreamResponse:
        body = msgspec.msgpack.decode(await request.read(), type=GenerateRequest)
        info = LegInfo(cached_tokens=len(body.prompt_token_ids) - 1, computed_tokens=1)
        delta = TokenDelta(index=0, token_ids=[65], finish_reason=FinishReason.LENGTH, info=info)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(frame_around(request, msgspec.msgpack.encode(delta)))
        await response.write_eof()
        return response

    app = web.Application()
    app.add_routes([web.get("/v1/info", info), web.post("/v1/prefill", prefill), web.post("/v1/generate", generate)])
    return app


async def serve_nodes(secret: str | None = None) -> None:
    """The mock nodes' process: print their ports, serve until it is ended. `secret`: the file with their cluster's."""
    source = TrustSource(cluster="router-benchmark", secret=None if secret is None else SecretConfig(file=secret))
    trust, ports = open_trust(source), []
    for number, role in enumerate(ROLES):
        app = node_app(f"n{number}", role)
        if trust.secrets is not None:
            ProvenCalls(RequestVerifier(trust, SystemClock(), None)).add_to(app)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ports.append(runner.addresses[0][1])
    print("ports " + json.dumps(ports), flush=True)
    await asyncio.Event().wait()


def through(url: str) -> tuple[aiohttp.ClientSession, _Request]:
    """An OpenAI client."""
    session = http_session(connector=aiohttp.TCPConnector(limit=256))
    body = json.dumps({"model": "mock", "prompt": "x" * PROMPT_TOKENS, "max_tokens": 1}).encode()

    async def send(_: int) -> None:
        async with session.post(url + "/v1/completions", data=body) as response:
            answer = await response.read()
            if response.status != 200:
                raise SystemExit(f"the router answered {response.status}: {answer!r}")

    return session, send


async def load(send: _Request, clients: int, requests: int) -> tuple[float, list[float]]:
    """Requests a second, and the seconds of each, with so many under way all the time."""
    taken: list[float] = []
    numbers = iter(range(requests))

    async def worker() -> None:
        for number in numbers:
            began = time.perf_counter()
            await send(number)
            taken.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(clients)))
    return requests / (time.perf_counter() - began), taken


async def until_served(session: aiohttp.ClientSession, url: str) -> None:
    """Until the router has probed its nodes."""
    async with asyncio.timeout(20):
        while True:
            async with session.get(url + "/health") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--secret")
    uvloop.run(serve_nodes(parser.parse_args().secret))
