"""What proofs cost: the router's calls to nodes, TCP's greeting, MACs of TCP's frames. Two clusters, one with a secret,
by turns.

Estimate: frames cost either end one pass of AES-256-GMAC (20 to 30 GB/s where there is VAES) and the host a copy of
what is read, beside the 3 to 4 GB/s that a stream of loopback gives: a get of 64 MiB keeps 0.75 or so of its rate.
"""

import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import yaml

from benchmarks.children import Child, child
from benchmarks.router_mocks import ROLES
from benchmarks.trust_nodes import CONFIG, load, through, until_served
from kvcore.config.schema import TransportConfig
from kvcore.errors import TransferError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secret_text import new_secret, parse_secrets
from kvcore.trust.secrets import Secrets
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import build_transfer, start_segment_hosts

CLIENTS, REQUESTS = 8, 160
SIZE, SMALL, TIMEOUT_S = 64 << 20, 4 << 10, 30.0
TCP, FRAMES = TransportConfig(kind="tcp"), TransportConfig(kind="tcp", integrity="frames")


_SHOWN = {
    "first": "first 4 KiB of a connection",
    "small": "4 KiB",
    "get": "get of 64 MiB",
    "put": "put of 64 MiB",
}
Move = Callable[[Sequence[TransferOp], float], Awaitable[list[TransferError | None]]]


async def measure_proofs(rounds: int) -> dict[str, float]:
    """The RESULT's part."""
    return await _router(rounds) | await _tcp(rounds)


async def _router(rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_text(new_secret() + "\n")
        secret.chmod(0o600)
        async with _running(Path(folder), None) as plain, _running(Path(folder), secret) as proven:
            taken: dict[str, list[float]] = {"open": [], "proven": []}
            for number in range(rounds + 1):
                for name, router in (("open", plain), ("proven", proven)):
                    session, send = through(router.said)
                    await until_served(session, router.said)
                    before = router.cpu_s()
                    await load(send, CLIENTS, REQUESTS)
                    if number:  # the first round warms
                        taken[name].append((router.cpu_s() - before) / REQUESTS * 1e6)
                    await session.close()
    without, with_proofs = (statistics.median(taken[name]) for name in ("open", "proven"))
    print(f"router, processor time of a request: {without:.0f} us, with proofs {with_proofs:.0f} us")
    return {"router_added_us": round(with_proofs - without, 1)}


@asynccontextmanager
async def _running(folder: Path, secret: Path | None) -> AsyncIterator[Child]:
    """A router with its mock nodes."""
    more = [] if secret is None else ["--secret", str(secret)]
    async with child(["-m", "benchmarks.trust_nodes", *more], r"^ports (.*)") as nodes:
        ports: list[int] = json.loads(nodes.said)
        listed = {f"n{n}": {"role": role, "port": ports[n]} for n, role in enumerate(ROLES)}
        config = yaml.safe_load(CONFIG.format(nodes=json.dumps(listed)))
        if secret is not None:
            config["security"] = {"secret": {"file": str(secret)}}
        file = folder / f"{'open' if secret is None else 'proven'}.yaml"
        file.write_text(yaml.safe_dump(config))
        async with child(["-m", "router", "--config", str(file)], r"url=\"?(http://[^\s\"]+)") as router:
            yield router


WAYS = {"open": (TCP, False), "proven": (TCP, True), "frames": (FRAMES, True)}


async def serve_segments(secret: str) -> None:
    """The process with a segment for each of `WAYS`: print them, serve them until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncExitStack() as stack:
        segments = []
        for name, (config, proven) in WAYS.items():
            memory = stack.enter_context(SegmentMemory.create(f"{name}.1", SIZE))
            hosts = await start_segment_hosts(config, memory, host="127.0.0.1", trust=_trust(secret, proven))
            stack.push_async_callback(hosts.aclose)
            here, addresses = host_identity(), hosts.addresses
            segments.append(Segment(id=f"{name}.1", node_id=name, size_bytes=SIZE, host_id=here, addresses=addresses))
        print("segments " + msgspec.json.encode(segments).decode(), flush=True)
        await stop.wait()


def _trust(secret: str, proven: bool) -> ClusterTrust:
    return ClusterTrust("benchmark", Secrets(parse_secrets(secret))) if proven else OPEN


async def _tcp(rounds: int) -> dict[str, float]:
    secret = new_secret()
    times = defaultdict[tuple[str, str], list[float]](list)
    into = memoryview(bytearray(os.urandom(SIZE)))
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(
            child(["-m", "benchmarks.trust", "--serve-segments", secret], r"^segments (.*)")
        )
        segments = dict(zip(WAYS, msgspec.json.decode(served.said, type=list[Segment]), strict=True))
        opened = {name: (config, _trust(secret, proven)) for name, (config, proven) in WAYS.items()}
        standing = {name: build_transfer(one, host_identity(), trust=trust) for name, (one, trust) in opened.items()}
        for engine in standing.values():
            stack.push_async_callback(engine.aclose)
        for number in range(rounds + 1):
            for name, (config, trust) in opened.items():
                segment, engine = segments[name], standing[name]
                fresh = build_transfer(config, host_identity(), trust=trust)
                taken = {"first": await _move(fresh.read, segment, into[:SMALL])}
                await fresh.aclose()
                taken["small"] = min([await _move(engine.read, segment, into[:SMALL]) for _ in range(20)])
                taken["get"] = await _move(engine.read, segment, into)
                taken["put"] = await _move(engine.write, segment, into)
                if number:
                    for what, seconds in taken.items():
                        times[name, what].append(seconds)
    for what in ("first", "small", "get", "put"):
        shown = ", ".join(f"{name} {statistics.median(times[name, what]) * 1e6:.0f} us" for name in WAYS)
        print(f"tcp, {_SHOWN[what]}: {shown}", flush=True)

    def added_us(what: str, name: str, to: str) -> int:
        return round((statistics.median(times[name, what]) - statistics.median(times[to, what])) * 1e6)

    def ratio(what: str, name: str, to: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[to, what], times[name, what], strict=True)), 3)

    return {
        "tcp_proven_over_open_get": ratio("get", "proven", "open"),
        "tcp_greeting_added_us": added_us("first", "proven", "open"),
        "tcp_frames_over_greeting_get": ratio("get", "frames", "proven"),
        "tcp_frames_over_greeting_put": ratio("put", "frames", "proven"),
        "tcp_frames_added_us": added_us("small", "frames", "proven"),
    }


async def _move(move: Move, segment: Segment, buffer: memoryview) -> float:
    began = time.perf_counter()
    (error,) = await move([TransferOp(segment, 0, [buffer], lambda _: None)], TIMEOUT_S)
    if error is not None:
        raise SystemExit(f"a transfer failed: {error.message}")
    return time.perf_counter() - began
