"""A cluster of real processes on free ports for integration tests: started, watched by their logs, ended by pid."""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec
import yaml
from support.ports import free_ports

from kvcore.process.child import ChildProcess
from metadata_server.account_messages import Stats
from nodeapi.frames import FrameDecoder
from nodeapi.messages import GenerateRequest, NodeReport, PrefillRequest, PrefillResult, StreamFrame

T = TypeVar("T")
START_S = 30.0


Transport = str | dict[str, object]
"""As a cluster file has it."""


class Cluster:
    """Nodes `p0`, `d0` and `s0` with sim engines, a metadata server and a router, none of them started yet."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession, *, transport: Transport = "auto") -> None:
        self.session = session
        self.file = folder / "cluster.yaml"
        self.ports = dict(zip(("p0", "d0", "s0", "metadata", "router"), free_ports(5), strict=True))
        self.children: dict[str, ChildProcess] = {}
        self.lines: dict[str, list[str]] = {}
        self.engine = {"kind": "sim", "prefill_tokens_per_s": 1e6, "inter_token_s": 0.001, "bytes_per_token": 64}
        roles = {"p0": "prefiller", "d0": "decoder", "s0": "store"}
        nodes = {name: {"role": role, "port": self.ports[name], "segment": "4MiB"} for name, role in roles.items()}
        self.file.write_text(
            yaml.safe_dump(
                {
                    "cluster": "test",
                    "model": {"path": "sim", "name": "sim"},
                    "engine": self.engine,
                    "nodes": nodes,
                    "kv": {"chunk_tokens": 64},
                    "transport": transport,
                    "metadata_server": {
                        "port": self.ports["metadata"],
                        "node_ttl_s": 1.0,
                        "records": {"kind": "sqlite", "path": str(self.file.with_name("records.sqlite"))},
                    },
                    "router": {"port": self.ports["router"]},
                    "service": {"drain_s": 60.0},  # a busy machine needs some seconds for what is under way
                }
            )
        )
        self.programs = {"p0": "prefiller", "d0": "decoder", "s0": "kvnode", "metadata": "metadata_server"}
        self.programs["router"] = "router"

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    async def start(self, *names: str) -> None:
        """Returns when all are ready."""
        await asyncio.gather(*(self._start(name) for name in names))

    async def _start(self, name: str) -> None:
        ready = asyncio.Event()
        lines = self.lines.setdefault(name, [])

        def on_line(line: str) -> None:
            print(line)
            lines.append(line)
            if "kvcore.service ready" in line:
                ready.set()

        command = [sys.executable, "-m", self.programs[name], "--config", str(self.file)]
        child = await ChildProcess.start(command, on_line=on_line)
        self.children[name] = child
        waiting = {asyncio.create_task(ready.wait()), asyncio.create_task(child.wait())}
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        assert ready.is_set(), f"{name} did not become ready: {lines}"

    async def end(self) -> None:
        for child in self.children.values():
            child.kill()
        await asyncio.gather(*(child.wait() for child in self.children.values()))

    async def get(self, name: str, path: str, kind: type[T]) -> T:
        headers = {"Accept": "application/msgpack"}
        async with self.session.get(self.url(name) + path, headers=headers) as response:
            assert response.status == 200, await response.read()
            return msgspec.msgpack.decode(await response.read(), type=kind)

    async def report(self, name: str) -> NodeReport:
        return await self.get(name, "/v1/info", NodeReport)

    async def stats(self) -> Stats:
        return await self.get("metadata", "/v1/stats", Stats)

    async def joined(self, *names: str) -> None:
        """Until the metadata server knows the nodes, with their engines' fingerprints, and no others."""
        async with asyncio.timeout(60):
            while True:
                nodes = (await self.stats()).nodes
                complete = all(node.fingerprint for node in nodes if node.role != "store")
                if {node.id for node in nodes} == set(names) and complete:
                    return
                await asyncio.sleep(0.02)

    async def prefill(self, name: str, request: PrefillRequest) -> PrefillResult:
        data = msgspec.msgpack.encode(request)
        async with self.session.post(self.url(name) + "/v1/prefill", data=data) as response:
            body = await response.read()
            assert response.status == 200, body
            return msgspec.msgpack.decode(body, type=PrefillResult)

    async def generate(self, name: str, request: GenerateRequest) -> AsyncGenerator[StreamFrame, None]:
        data, decoder = msgspec.msgpack.encode(request), FrameDecoder()
        async with self.session.post(self.url(name) + "/v1/generate", data=data) as response:
            assert response.status == 200, await response.read()
            async for part in response.content.iter_any():
                for payload in decoder.feed(part):
                    yield msgspec.msgpack.decode(payload, type=StreamFrame)


@asynccontextmanager
async def cluster(folder: Path, *, transport: Transport = "auto") -> AsyncIterator[Cluster]:
    async with aiohttp.ClientSession() as session:
        subject = Cluster(folder, session, transport=transport)
        try:
            yield subject
        finally:
            await subject.end()
