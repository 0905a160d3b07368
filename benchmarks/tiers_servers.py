"""The servers behind the tiers of benchmarks.tiers, and the section of a cluster file for each."""

import asyncio
import os
import shutil
import sys
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.children import Child, program
from benchmarks.vllm_pd_processes import free_port

KINDS = ("disk", "redis", "mooncake", "object")


@dataclass(slots=True)
class Servers:
    """`sections`: kind -> its section. `missing`: kind -> why it is not there."""

    sections: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    processes: dict[str, Child] = field(default_factory=dict)
    redis_port: int = 0
    missing: dict[str, str] = field(default_factory=dict)


@asynccontextmanager
async def servers(folder: Path, size_bytes: int, host: str, kinds: Sequence[str] = KINDS) -> AsyncIterator[Servers]:
    """Room for `size_bytes` in each; all of them end with the context. `host`: an address that is not loopback, which
    Mooncake's clients want."""
    async with AsyncExitStack() as stack:
        found = Servers()
        if "disk" in kinds:
            (folder / "disk").mkdir(parents=True)
            found.sections["disk"] = {"path": str(folder / "disk"), "size": size_bytes}
        if "redis" in kinds:
            await _redis(stack, found, size_bytes)
        if "object" in kinds:
            await _objects(stack, found)
        if "mooncake" in kinds:
            await _mooncake(stack, found, size_bytes, host)
        yield found


async def _redis(stack: AsyncExitStack, found: Servers, size_bytes: int) -> None:
    if shutil.which("redis-server") is None:
        found.missing["redis"] = "there is no redis-server"
        return
    found.redis_port = free_port()
    command = ["redis-server", "--port", str(found.redis_port), "--bind", "127.0.0.1", "--save", ""]
    command += ["--appendonly", "no", "--maxmemory", str(2 * size_bytes), "--maxmemory-policy", "allkeys-lru"]
    found.processes["redis"] = await stack.enter_async_context(program(command, "(?i)(ready to accept) connections"))
    found.sections["redis"] = {"url": f"redis://127.0.0.1:{found.redis_port}"}


async def _objects(stack: AsyncExitStack, found: Servers) -> None:
    """moto, an S3 server for tests that keeps all in memory: what it costs itself is not what a store would."""
    lacking = [name for name in ("obstore", "moto") if find_spec(name) is None]
    if lacking:
        found.missing["object"] = f"there is no {lacking[0]} in this Python"
        return
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    port = free_port()
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    found.processes["object"] = await stack.enter_async_context(program(command, "(Running) on"))
    endpoint = f"http://127.0.0.1:{port}"
    signed = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=none"
    headers = {"Authorization": signed, "Content-Length": "0"}
    request = urllib.request.Request(f"{endpoint}/kvferry", method="PUT", headers=headers)
    await asyncio.to_thread(lambda: urllib.request.urlopen(request).close())
    found.sections["object"] = {"url": "s3://kvferry/benchmark", "endpoint": endpoint, "timeout_s": 60.0}


async def _mooncake(stack: AsyncExitStack, found: Servers, size_bytes: int, host: str) -> None:
    """A master, and a client that lends the memory and lives on when the nodes are stopped."""
    folder = Path(sys.executable).parent
    if find_spec("mooncake") is None or not (folder / "mooncake_master").exists():
        found.missing["mooncake"] = "there is no mooncake in this Python"
        return
    if host.startswith("127."):
        found.missing["mooncake"] = "there is no address but loopback: needs root and ip"
        return
    rpc, metrics, lender = free_port(), free_port(), free_port()
    master = [str(folder / "mooncake_master"), f"--rpc_address={host}", f"--rpc_port={rpc}"]
    master += [f"--metrics_host={host}", f"--metrics_port={metrics}"]
    master += ["--client_ttl=120"]  # one that stands still for longer than 10 s, its default, is gone with all it holds
    await stack.enter_async_context(program(master, "(service_ready=true)"))
    lend = [str(folder / "mooncake_client"), f"--host={host}", f"--port={lender}", "--protocol=tcp"]
    lend += [f"--master_server_address={host}:{rpc}", "--metadata_server=P2PHANDSHAKE"]
    lend += [f"--global_segment_size={2 * size_bytes >> 20} MB"]
    found.processes["mooncake"] = await stack.enter_async_context(program(lend, "(Starting real client service)"))
    found.sections["mooncake"] = {"master": f"{host}:{rpc}"}
