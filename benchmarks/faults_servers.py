"""Routers in front of servers that are not theirs, in benchmarks.faults: kvferry's, and others'.

Each cell has a router and four mock servers of its own: what breakers and loads one cell has left is no other's. What
is killed stays dead until then.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import yaml

from benchmarks.children import Child, child, program
from benchmarks.faults_cells import ROUTER_STOPS_S, Fault
from benchmarks.faults_mocks import MODEL, text_after
from kvcore.process.http_client import http_session

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.plain_vllm import write_model_folder
from support.ports import free_ports

NAMES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
READY_S = 30.0
PEERS = ("sglang-router", "vllm-router", "smg")
_AWAY = (aiohttp.ClientError, TimeoutError, OSError)
_Urls = dict[str, str]


def _kvferry(urls: _Urls, port: int, folder: Path, _python: str) -> list[str]:
    nodes = {name: {"role": "prefiller" if "prefill" in name else "decoder", "url": url} for name, url in urls.items()}
    file = folder / "plain.yaml"
    config = {
        "cluster": "plain",
        "handoff": "nixl",
        "model": {"path": str(write_model_folder(folder / "model")), "name": MODEL},
        "nodes": nodes,
        "router": {"port": port, "drain_s": 0.5},
    }
    file.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "router", "--config", str(file)]


def _listed(urls: _Urls, role: str, *more: str) -> list[str]:
    return [word for name, url in urls.items() if role in name for word in (f"--{role}", url, *more)]


def _sglang(urls: _Urls, port: int, _folder: Path, python: str) -> list[str]:
    nodes = [*_listed(urls, "prefill", "9000"), *_listed(urls, "decode")]
    return [python, "-m", "sglang_router.launch_router", "--pd-disaggregation", *nodes, *_at(port)]


def _vllm(urls: _Urls, port: int, _folder: Path, python: str) -> list[str]:
    nodes = [*_listed(urls, "prefill"), *_listed(urls, "decode")]
    return [python, "-m", "vllm_router.launch_router", "--vllm-pd-disaggregation", *nodes, *_at(port)]


def _smg(urls: _Urls, port: int, _folder: Path, python: str) -> list[str]:
    nodes = [*_listed(urls, "prefill", "9000"), *_listed(urls, "decode")]
    return [python, "-m", "smg.launch_router", "--pd-disaggregation", *nodes, *_at(port)]


def _at(port: int) -> list[str]:
    (metrics,) = free_ports(1)
    return ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]


COMMANDS: dict[str, Callable[[_Urls, int, Path, str], list[str]]] = {
    "plain": _kvferry,
    "sglang-router": _sglang,
    "vllm-router": _vllm,
    "smg": _smg,
}
"""Of each router: where the servers are, its port, a folder, the Python that has it."""


@dataclass(slots=True)
class Servers:
    """A router and its servers."""

    name: str
    url: str
    session: aiohttp.ClientSession
    urls: _Urls
    mocks: dict[str, Child]
    router_pid: int
    fresh = True
    model = MODEL
    max_tokens = 24
    _stopped: list[int] = field(default_factory=list)
    _gone: set[str] = field(default_factory=set)

    def more(self, _: str) -> dict[str, object]:
        """Fields of each body: none, as not every router takes the same."""
        return {}

    async def texts(self, prompts: Sequence[str]) -> list[str]:
        """What servers answer that nobody hurts."""
        return [text_after(prompt, self.max_tokens) for prompt in prompts]

    async def busy(self, whom: str) -> bool:
        """Whether it works for a request now; true of what is no server."""
        return whom not in self.urls or await self._running(whom) > 0

    async def strike(self, fault: Fault) -> None:
        """It has happened when this returns; a router goes on then."""
        if fault.whom == "router":
            self._stopped.append(self.router_pid)
            os.kill(self.router_pid, signal.SIGSTOP)
            await asyncio.sleep(ROUTER_STOPS_S)
            self.heal()
        elif fault.kind in ("kill", "stop"):
            pid = self.mocks[fault.whom].pid
            os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            self._gone.add(fault.whom)
            if fault.kind == "stop":
                self._stopped.append(pid)
        elif fault.kind != "leave":
            await self._tell(fault.whom, fault.kind)

    def heal(self) -> None:
        """What stands still goes on; the rest goes with this router."""
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()

    async def held(self) -> str:
        """Requests that servers have which can be asked, and kvferry's router itself."""
        found = []
        for name in self.urls.keys() - self._gone:
            with suppress(*_AWAY):
                if running := await self._running(name):
                    found.append(f"{running} requests at {name}")
        if self.name == "plain":
            async with self.session.get(f"{self.url}/v1/cluster") as reply:
                if in_flight := (await reply.json())["requests"]["in_flight"]:
                    found.append(f"{in_flight} requests at the router")
        return ", ".join(found)

    async def record(self, request_id: str) -> str:
        """What kvferry's router knows of the request."""
        if self.name in PEERS:
            return ""
        async with self.session.get(f"{self.url}/v1/requests/{request_id}") as reply:
            return await reply.text()

    async def again(self) -> bool:
        """It is used for one cell only."""
        return True

    async def _running(self, name: str) -> int:
        async with self.session.get(f"{self.urls[name]}/control") as reply:
            return int((await reply.json())["running"])

    async def _tell(self, whom: str, fault: str) -> None:
        async with self.session.post(f"{self.urls[whom]}/control", json={"fault": fault}) as reply:
            await reply.read()


@asynccontextmanager
async def servers(name: str, folder: Path, python: str) -> AsyncIterator[Servers]:
    """Four mock servers and the router `name`, once it has answered a request. `python`: that has the router."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            http_session(timeout=aiohttp.ClientTimeout(total=5), connector=aiohttp.TCPConnector(limit=0))
        )
        mocks = {mock: await stack.enter_async_context(_mock(mock)) for mock in NAMES}
        urls = {mock: one.said for mock, one in mocks.items()}
        (port,) = free_ports(1)
        url, command = f"http://127.0.0.1:{port}", COMMANDS[name](urls, port, folder, python)
        router = await stack.enter_async_context(program(command, r"(.)"))
        found = Servers(name, url, session, urls, mocks, router.pid)
        stack.callback(found.heal)
        await _answers(found)
        yield found


def _mock(name: str) -> AbstractAsyncContextManager[Child]:
    return child(["-m", "benchmarks.faults_mocks", name], r"serves (http\S+)")


async def _answers(found: Servers) -> None:
    body = {"model": MODEL, "prompt": "is anybody there?" * 8, "max_tokens": 2, "temperature": 0}
    said = "nothing"
    try:
        async with asyncio.timeout(READY_S):
            for _ in range(4):  # so that each server has had one
                while True:
                    with suppress(*_AWAY):
                        async with found.session.post(f"{found.url}/v1/completions", json=body) as reply:
                            said = f"{reply.status} {(await reply.text())[:200]}"
                            if reply.status == 200:
                                break
                    await asyncio.sleep(0.2)
    except TimeoutError:
        raise RuntimeError(f"{found.name} does not answer; it said last: {said}") from None
