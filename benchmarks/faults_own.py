"""kvferry's own cluster in benchmarks.faults: two prefillers, two decoders, a store, with its defaults; and hurting it.

Nodes are reached by the router through proxies, which can do to a node's API what networks and sick processes do;
everything else reaches them as always. Faults of processes are signals.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import yaml

from benchmarks.faults_cells import ROUTER_STOPS_S, Fault
from benchmarks.faults_load import Load
from benchmarks.faults_proxy import Proxy, proxy_to
from engines.sim.reference import expected_tokens
from kvcore.config.file import load_config
from kvcore.config.schema import SimEngineConfig
from kvcore.process.http_client import http_session
from kvferry.launch.launcher import Launcher
from kvferry.launch.processes import ProcessKind, plan_processes
from nodeapi.messages import NodeReport
from nodeapi.sampling import SamplingParams
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import ByteTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.ports import free_ports

READY_S = 90.0
ENGINES: dict[str, dict[str, object]] = {
    "sim": {"kind": "sim", "block_size": 16, "prefill_tokens_per_s": 3000, "inter_token_s": 0.03},
    "torch": {"kind": "torch", "block_size": 16, "kv_cache": "64MiB", "max_batch_tokens": 256},
}
MAX_TOKENS = {"sim": 32, "torch": 120}
ROLES = {"prefill-0": "prefiller", "prefill-1": "prefiller", "decode-0": "decoder", "decode-1": "decoder"}
GAUGES = ("running", "waiting", "loading", "pending_saves")
_AWAY = (aiohttp.ClientError, TimeoutError, OSError)


@dataclass(slots=True)
class OwnCluster:
    """One that is up."""

    name: str
    launcher: Launcher
    session: aiohttp.ClientSession
    metadata_url: str
    node_urls: dict[str, str]
    proxies: dict[str, Proxy]
    fresh = False
    """Whether each cell needs one of its own."""
    model = "m"
    _stopped: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The router's."""
        return self.launcher.router_url

    @property
    def max_tokens(self) -> int:
        """Of each answer: about a second's."""
        return MAX_TOKENS[self.name]

    def more(self, cell: str) -> dict[str, object]:
        """Fields of each body: no cell finds what another one has cached, and each token is told at once."""
        return {"cache_salt": f"cell {cell}", "return_token_ids": True}

    async def texts(self, prompts: Sequence[str]) -> list[str]:
        """What the cluster answers while nothing is wrong."""
        load = Load(self.url, self.model, prompts, self.max_tokens, self.more("reference"))
        seen = await load.run()
        if problems := [one.problem for one in seen if one.problem]:
            raise RuntimeError(f"a healthy cluster does not answer: {problems[0]}")
        return [one.text for one in seen]

    async def busy(self, whom: str) -> bool:
        """Whether it works for a request now; true of what is no node."""
        name = whom.partition(" ")[0]
        with suppress(*_AWAY):
            return name not in ROLES or any((await self._gauges(name)).values())
        return False

    async def strike(self, fault: Fault) -> None:
        """It has happened when this returns; a router goes on then."""
        if fault.kind in ("kill", "stop"):
            pid = self.pid(fault.whom)
            os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            if fault.kind == "stop":
                self._stopped.append(pid)
            if fault.whom == "router":
                await asyncio.sleep(ROUTER_STOPS_S)
                self._go_on()
        elif fault.kind != "leave":
            self.proxies[fault.whom].fault = fault.kind

    def heal(self) -> None:
        """Nothing is done to anybody any longer; what was killed is being started again."""
        self._go_on()
        for proxy in self.proxies.values():
            proxy.heal()

    async def held(self) -> str:
        """What anybody holds for a request; empty: nothing."""
        found = []
        try:
            stats = await self._json(f"{self.metadata_url}/v1/stats")
            found += [f"{stats[what]} {what}" for what in ("reservations", "read_leases", "waiters") if stats[what]]
            in_flight = (await self._json(f"{self.url}/v1/cluster"))["requests"]["in_flight"]
            found += [f"{in_flight} requests"] if in_flight else []
        except _AWAY as error:
            found.append(f"cannot be asked: {type(error).__name__}")
        found += [f"{proxy.held} legs at {name}" for name, proxy in self.proxies.items() if proxy.held]
        stopped = {name for name in ROLES if {self.pid(name), self.pid(f"{name} engine")} & set(self._stopped)}
        for name in ROLES.keys() - stopped:
            with suppress(*_AWAY):
                found += [f"{count} {gauge} at {name}" for gauge, count in (await self._gauges(name)).items() if count]
        return ", ".join(found)

    async def record(self, request_id: str) -> str:
        """What the router knows of the request."""
        try:
            return json.dumps(await self._json(f"{self.url}/v1/requests/{request_id}"))
        except _AWAY:
            return ""

    async def leases(self) -> int | None:
        """Reservations and read leases; None: nobody can say."""
        try:
            stats = await self._json(f"{self.metadata_url}/v1/stats")
        except _AWAY:
            return None
        return int(stats["reservations"] + stats["read_leases"])

    def pids(self) -> list[tuple[str, int]]:
        """Of all processes that run, each with its name; engines too."""
        names = [*self.launcher.pids, *(f"{name} engine" for name in ROLES)]
        return [(name, pid) for name in names if (pid := self.pid(name))]

    async def whole(self) -> bool:
        """Whether router and metadata server have every node and nothing is held for anybody, within READY_S."""
        try:
            async with asyncio.timeout(READY_S):
                while not await self._is_whole():  # noqa: ASYNC110 - other processes'
                    await asyncio.sleep(0.2)
        except TimeoutError:
            return False
        return True

    async def again(self) -> bool:
        """As `whole`, with a router that has learnt nothing of what happened before."""
        pid = self.launcher.pids["router"]
        os.kill(pid, signal.SIGKILL)
        await self.launcher.wait_restarted("router", pid, READY_S)
        return await self.whole()

    async def _is_whole(self) -> bool:
        with suppress(*_AWAY, KeyError):
            status = await self._json(f"{self.url}/v1/cluster")
            stats = await self._json(f"{self.metadata_url}/v1/stats")
            ready = {node["id"] for node in stats["nodes"] if node.get("fingerprint") or node["role"] == "store"}
            healthy = {node["id"] for node in status["nodes"] if node["healthy"]}
            known = bool(status["metadata_connected"]) and ready == healthy | {"store-0"} >= set(self.node_urls)
            return known and not await self.held()
        return False

    async def _gauges(self, name: str) -> dict[str, int]:
        timeout = aiohttp.ClientTimeout(total=2)
        async with self.session.get(f"{self.node_urls[name]}/v1/info", timeout=timeout) as reply:
            report = msgspec.msgpack.decode(await reply.read(), type=NodeReport)
        return {gauge: getattr(report.stats, gauge) if report.stats else 0 for gauge in GAUGES}

    async def _json(self, url: str) -> Any:
        timeout, headers = aiohttp.ClientTimeout(total=2), {"Accept": "application/json"}
        async with self.session.get(url, headers=headers, timeout=timeout) as reply:
            return await reply.json(content_type=None)

    def pid(self, whom: str) -> int:
        """Of a process, or of a node's engine; 0: it does not run now."""
        name, _, engine = whom.partition(" ")
        pid = self.launcher.pids.get(name, 0)
        if not engine or not pid:
            return pid
        with suppress(psutil.NoSuchProcess):
            return next((child.pid for child in psutil.Process(pid).children()), 0)
        return 0

    def _go_on(self) -> None:
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stopped.clear()


def sim_text(prompt: str, max_tokens: int) -> str:
    """What the simulated engine answers, from tokens alone. One that is cut within a character ends before it."""
    engine = msgspec.convert(ENGINES["sim"], SimEngineConfig)
    tokenizer = ByteTokenizer(engine.vocab_size)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    asked = tokenizer.encode(prompt)
    (tokens,) = expected_tokens(engine, asked, sampling)
    return Detokenizer(tokenizer, asked).feed(tokens)


def _tiny_model(folder: Path) -> str:
    from support.tiny_models import make_tiny_model  # torch and transformers take seconds to load

    return str(make_tiny_model("llama", folder, max_context=2048))


def write_file(folder: Path, engine: str) -> Path:
    """The cluster file: what a user has who changes nothing but the engine's speed."""
    path = "sim" if engine == "sim" else _tiny_model(folder / "model")
    metadata, router, *ports = free_ports(2 + len(ROLES) + 1)
    nodes = {
        name: {"role": role, "port": port, "segment": "64MiB"}
        for (name, role), port in zip([*ROLES.items(), ("store-0", "store")], ports, strict=True)
    }
    config = {
        "cluster": f"faults-{engine}",
        "model": {"path": path, "name": OwnCluster.model},
        "engine": ENGINES[engine],
        "kv": {"chunk_tokens": 64},
        "nodes": nodes,
        "metadata_server": {"port": metadata, "records": {"kind": "memory"}},
        "router": {"port": router, "drain_s": 1.0},
        "service": {"drain_s": 2.0},
    }
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@asynccontextmanager
async def own_cluster(engine: str, folder: Path) -> AsyncIterator[OwnCluster]:
    """All of its processes, until it is left."""
    file = write_file(folder, engine)
    config = load_config(file)
    async with AsyncExitStack() as stack:
        urls = {name: f"http://127.0.0.1:{node.port}" for name, node in config.nodes.items()}
        proxies = {name: await stack.enter_async_context(proxy_to(urls[name])) for name in ROLES}
        through = [f"nodes.{name}.port={proxy.url.rpartition(':')[2]}" for name, proxy in proxies.items()]
        plans = [
            replace(plan, command=(*plan.command, *(word for one in through for word in ("--set", one))))
            if plan.kind is ProcessKind.ROUTER
            else plan
            for plan in plan_processes(config, file)
        ]
        launcher = Launcher(config, file, log_dir=folder / "logs", plans=plans)
        session = await stack.enter_async_context(http_session())
        await stack.enter_async_context(launcher)
        await launcher.wait_ready(READY_S)
        found = OwnCluster(engine, launcher, session, f"http://127.0.0.1:{config.metadata_server.port}", urls, proxies)
        stack.callback(found.heal)
        if not await found.whole():
            raise RuntimeError(f"the cluster is not whole after {READY_S:g} s; logs: {folder / 'logs'}")
        yield found
