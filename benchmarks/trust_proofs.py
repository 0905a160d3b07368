"""What proofs cost: the router's calls to nodes, and TCP's greeting. Two clusters, one with a secret, by turns."""

import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import yaml

from benchmarks.children import Child, child
from benchmarks.router import CONFIG, ROLES, load, through, until_served
from kvcore.config.schema import TransportConfig
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secret_text import new_secret, parse_secrets
from kvcore.trust.secrets import Secrets
from kvcore.types import Segment
from transfer.base import TransferEngine, TransferOp
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import build_transfer, start_segment_hosts

CLIENTS, REQUESTS = 8, 160
SIZE, SMALL, TIMEOUT_S = 64 << 20, 4 << 10, 30.0
TCP = TransportConfig(kind="tcp")


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
    async with child(["-m", "benchmarks.router", "--serve-nodes", *more], r"^ports (.*)") as nodes:
        ports: list[int] = json.loads(nodes.said)
        listed = {f"n{n}": {"role": role, "port": ports[n]} for n, role in enumerate(ROLES)}
        config = yaml.safe_load(CONFIG.format(nodes=json.dumps(listed)))
        if secret is not None:
            config["security"] = {"secret": {"file": str(secret)}}
        file = folder / f"{'open' if secret is None else 'proven'}.yaml"
        file.write_text(yaml.safe_dump(config))
        async with child(["-m", "router", "--config", str(file)], r"url=\"?(http://[^\s\"]+)") as router:
            yield router


async def _tcp(rounds: int) -> dict[str, float]:
    secured = ClusterTrust("benchmark", Secrets(parse_secrets(new_secret())))
    rates: dict[str, list[float]] = {"open": [], "proven": []}
    firsts: dict[str, list[float]] = {"open": [], "proven": []}
    into = memoryview(bytearray(SIZE))
    async with AsyncExitStack() as stack:
        ways = {
            name: (trust, await _served(stack, name, trust)) for name, trust in (("open", OPEN), ("proven", secured))
        }
        standing = {name: build_transfer(TCP, host_identity(), trust=trust) for name, (trust, _) in ways.items()}
        for engine in standing.values():
            stack.push_async_callback(engine.aclose)
        for number in range(rounds + 1):
            for name, (trust, segment) in ways.items():
                fresh = build_transfer(TCP, host_identity(), trust=trust)
                first_s, whole_s = await _get(fresh, segment, into[:SMALL]), await _get(standing[name], segment, into)
                await fresh.aclose()
                if number:
                    firsts[name].append(first_s)
                    rates[name].append(SIZE / whole_s)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    first = {name: statistics.median(values) * 1e6 for name, values in firsts.items()}
    print(f"tcp, 64 MiB: {rate['open'] / 1e9:.2f} GB/s, after a proof {rate['proven'] / 1e9:.2f} GB/s")
    print(f"tcp, first 4 KiB of a connection: {first['open']:.0f} us, with a proof {first['proven']:.0f} us")
    return {
        "tcp_proven_over_open_get": round(rate["proven"] / rate["open"], 3),
        "tcp_greeting_added_us": round(first["proven"] - first["open"]),
    }


async def _served(stack: AsyncExitStack, name: str, trust: ClusterTrust) -> Segment:
    memory = stack.enter_context(SegmentMemory.create(f"{name}.1", SIZE))
    hosts = await start_segment_hosts(TCP, memory, host="127.0.0.1", trust=trust)
    stack.push_async_callback(hosts.aclose)
    return Segment(id=f"{name}.1", node_id=name, size_bytes=SIZE, host_id=host_identity(), addresses=hosts.addresses)


async def _get(engine: TransferEngine, segment: Segment, into: memoryview) -> float:
    began = time.perf_counter()
    (error,) = await engine.read([TransferOp(segment, 0, [into])], TIMEOUT_S)
    if error is not None:
        raise SystemExit(f"a get failed: {error.message}")
    return time.perf_counter() - began
