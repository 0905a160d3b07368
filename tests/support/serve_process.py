"""`kvferry serve` as its users run it, with a simulated engine, on ports of its own; ended by its process id."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from support.ports import free_ports

from kvcore.process.child import ChildProcess

CHUNK_TOKENS = 64
_START_S = 120.0
_ENGINE = "{kind: sim, block_size: 16, num_blocks: 512, bytes_per_token: 64, prefill_tokens_per_s: 4000, "
_ENGINE += "inter_token_s: 0.005}"
"""So slow that a tier is worth its while on any machine: a prompt of six chunks takes 0.1 s to compute, and far less to
load."""
_SIMULATED = [f"engine={_ENGINE}", "model.path=sim", "model.name=sim", "service.drain_s=2"]


@dataclass
class Served:
    """One running instance: its cluster has one node, `decode-0`, and a metadata server of its own."""

    url: str
    node_url: str
    metadata_url: str
    file: Path
    session: aiohttp.ClientSession
    lines: list[str] = field(default_factory=list)

    async def ask(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The tokens of a greedy answer, and how many tokens of the prompt were cached."""
        body = {"model": "sim", "prompt": list(prompt), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        async with self.session.post(f"{self.url}/v1/completions", json={**body, "return_token_ids": True}) as reply:
            answer = await reply.json()
            assert reply.status == 200, answer
        return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def get(self, url: str) -> dict[str, Any]:
        """An answer in JSON."""
        async with self.session.get(url, headers={"Accept": "application/json"}) as reply:
            answer: dict[str, Any] = await reply.json()
            assert reply.status == 200, answer
        return answer


@asynccontextmanager
async def served(
    folder: Path, *options: str, overrides: Sequence[str] = (), environment: Mapping[str, str] = {}
) -> AsyncIterator[Served]:
    """`kvferry serve` with these options, until it is ready; all its processes have ended afterwards."""
    port, node, metadata = free_ports(3)
    model, state = folder / "model", folder / "state"
    model.mkdir(parents=True)
    sets = [*_SIMULATED, f"nodes.decode-0.port={node}", f"metadata_server.port={metadata}", *overrides]
    command = [sys.executable, "-m", "kvferry", "serve", str(model), "--colocated", "--port", str(port), *options]
    if "--segment" not in options:
        command += ["--segment", "16MiB"]
    command += [word for one in sets for word in ("--set", one)]
    ready, lines = asyncio.Event(), list[str]()

    def on_line(line: str) -> None:
        print(f"{folder.name}: {line}")
        lines.append(line)
        if line.startswith("ready: "):
            ready.set()

    child = await ChildProcess.start(
        command, on_line=on_line, env={**os.environ, "XDG_STATE_HOME": str(state), **environment}
    )
    waiting = {asyncio.create_task(ready.wait()), asyncio.create_task(child.wait())}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=_START_S)
        assert ready.is_set(), f"kvferry serve did not become ready: {lines}"
        urls = [f"http://127.0.0.1:{number}" for number in (port, node, metadata)]
        async with aiohttp.ClientSession() as session:
            yield Served(urls[0], urls[1], urls[2], next(state.rglob("cluster.yaml")), session, lines)
    finally:
        for task in waiting:
            task.cancel()
        child.kill()
        await child.wait()
