"""What the router adds to a request: OpenAI completions through it to mock nodes, against the same two legs without it.

Three processes: two prefillers and two decoders that answer at once, the real router, and this load generator. A prompt
of 1900 tokens goes to both legs, as it would in a cluster; one token comes back.

Estimate: an HTTP call with msgpack costs 0.15 to 0.3 ms of processor on either side together. The direct way has two,
at the same time; through the router there are three, and the prompt is parsed, tokenized, hashed and encoded twice.
Run: python -m benchmarks.router [--requests 1000]
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from benchmarks.children import Child, child
from kvcore.chunk_keys import usable_chunks
from kvcore.clock import SystemClock
from kvcore.config.security import SecretConfig
from kvcore.process.http_client import http_session
from kvcore.trust.http_proof import RequestVerifier
from kvcore.trust.opening import TrustSource, open_trust
from kvcore.types import KVSpec, NodeInfo, Role, Segment
from kvnode.answers import ProvenCalls
from nodeapi.client import HttpNodeClient
from nodeapi.frames import pack_frame
from nodeapi.messages import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    LegInfo,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    SamplingParams,
    TokenDelta,
)

PROMPT_TOKENS = 1900
CHUNK_TOKENS = 256
CALL_S = 10.0
ROLES = (Role.PREFILLER, Role.PREFILLER, Role.DECODER, Role.DECODER)
LOADS = (1, 32)
CONFIG = """
cluster: router-benchmark
model: {{path: none, name: mock}}
engine: {{kind: sim}}
nodes: {nodes}
router: {{port: 0}}
metadata_server: {{port: 1}}
"""
_Request = Callable[[int], Awaitable[None]]


def report(node_id: str, role: Role) -> NodeReport:
    """What a mock node says of itself."""
    kv_spec = KVSpec(
        model_id="mock",
        weights_digest="",
        tokenizer_digest="",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        dtype="uint8",
        attention="",
        layout_id="mock",
        chunk_tokens=CHUNK_TOKENS,
        chunk_bytes=CHUNK_TOKENS,
    )
    return NodeReport(
        node=NodeInfo(id=node_id, role=role, control_url="", incarnation=1),
        engine=EngineInfo(
            kind="mock",
            kv_spec=kv_spec,
            max_context=1 << 16,
            vocab_size=1 << 16,
            eos_token_ids=[],
            block_size=16,
            num_blocks=1 << 16,
        ),
        stats=EngineStats(total_blocks=1 << 16),
        segments=[Segment(id=f"{node_id}.1", node_id=node_id, size_bytes=1 << 20, host_id="h", addresses={})],
    )


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
        await response.write(pack_frame(msgspec.msgpack.encode(delta)))
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


def direct(ports: list[int]) -> tuple[HttpNodeClient, _Request]:
    """Both legs of a request, at the same time, as the router sends them."""
    client = HttpNodeClient(connect_timeout_s=1.0, max_connections=256)
    prompt = [120] * PROMPT_TOKENS

    async def decode(url: str, request_id: str) -> None:
        sampling = SamplingParams(max_tokens=1)
        request = GenerateRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, deadline_s=CALL_S)
        async for _ in client.generate(url, request, timeout_s=CALL_S):
            pass

    async def send(number: int) -> None:
        prefiller, decoder = (f"http://127.0.0.1:{ports[at + number % 2]}" for at in (0, 2))
        prefill = PrefillRequest(request_id=f"p{number}", prompt_token_ids=prompt, deadline_s=CALL_S)
        await asyncio.gather(client.prefill(prefiller, prefill, timeout_s=CALL_S), decode(decoder, f"d{number}"))

    return client, send


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


async def measure(router: Child, ports: list[int], requests: int) -> dict[str, float]:
    """Print the table; returns the RESULT. Both ways take turns, five times, so that noise meets both."""
    client, legs = direct(ports)
    session, whole = through(router.said)
    await until_served(session, router.said)
    result: dict[str, float] = {}
    print(f"{'under way':>9}{'way':>9}{'p50 ms':>9}{'p99 ms':>9}{'req/s':>9}{'router cpu ms':>15}")
    for clients in LOADS:
        for send in (legs, whole):
            await load(send, clients, requests // 5)
        rates: dict[str, list[float]] = {"direct": [], "router": []}
        taken: dict[str, list[float]] = {"direct": [], "router": []}
        cpu_s = 0.0
        for _ in range(5):
            for way, send in (("direct", legs), ("router", whole)):
                before = router.cpu_s()
                rate, times = await load(send, clients, requests // 5)
                cpu_s += (router.cpu_s() - before) if way == "router" else 0.0
                rates[way].append(rate)
                taken[way] += times
        for way, times in taken.items():
            p50, p99 = statistics.median(times) * 1e3, statistics.quantiles(times, n=100)[98] * 1e3
            rate = statistics.median(rates[way])
            cpu = f"{cpu_s / len(times) * 1e3:15.3f}" if way == "router" else ""
            print(f"{clients:>9}{way:>9}{p50:>9.3f}{p99:>9.3f}{rate:>9.0f}{cpu}", flush=True)
            prefix = "" if way == "router" else "direct_"
            result |= {f"{prefix}c1_p50_ms": round(p50, 3)} if clients == 1 else {f"{prefix}c32_rps": round(rate)}
        result[f"c{clients}_router_cpu_ms"] = round(cpu_s / len(taken["router"]) * 1e3, 3)
    await client.aclose()
    await session.close()
    return result


async def until_served(session: aiohttp.ClientSession, url: str) -> None:
    """Until the router has probed its nodes."""
    async with asyncio.timeout(20):
        while True:
            async with session.get(url + "/health") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


async def run(requests: int) -> None:
    """Bring up the two processes, measure, print RESULT."""
    with tempfile.TemporaryDirectory() as folder:
        async with child(["-m", "benchmarks.router", "--serve-nodes"], r"^ports (.*)") as nodes:
            ports: list[int] = json.loads(nodes.said)
            config = Path(folder) / "cluster.yaml"
            listed = {f"n{n}": {"role": role, "port": ports[n]} for n, role in enumerate(ROLES)}
            config.write_text(CONFIG.format(nodes=json.dumps(listed)))
            async with child(["-m", "router", "--config", str(config)], r"url=\"?(http://[^\s\"]+)") as router:
                result = await measure(router, ports, requests)
    print("RESULT " + json.dumps(result))


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="for each way and load")
    parser.add_argument("--serve-nodes", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--secret", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    uvloop.run(serve_nodes(arguments.secret) if arguments.serve_nodes else run(arguments.requests))


if __name__ == "__main__":
    main()
