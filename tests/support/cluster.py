"""A whole cluster for integration tests: every process a real one, brought up by the launcher on free ports.

Requests go through the router as any client's would; a test kills processes by pid and looks at all of them.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import msgspec
import yaml
from support.gpus import GPU_SHARE, vllm_on_gpu
from support.ports import free_ports

from kvcore.config.file import load_config
from kvcore.config.partitions import PartitionConfig
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import internal_url, metadata_urls, operators_url_of, partitions_of, secured_url, urls_of
from kvcore.process.http_client import http_session, internal_ssl, operators_session, router_session
from kvcore.trust.opening import open_trust, trust_source
from kvcore.trust.tls import pinned_context
from kvferry.launch.launcher import Launcher
from kvferry.launch.processes import ProcessKind, ProcessPlan, plan_processes
from metadata_server.account_messages import Stats
from metadata_server.partitions.merging import merged_stats
from nodeapi.messages import NodeReport
from router.cache.report import CacheStats

READY_S = {"sim": 60.0, "torch": 60.0, "vllm": 400.0}
POLL_S = 0.02
SIM_ENGINE = {
    "kind": "sim",
    "block_size": 16,
    "num_blocks": 2048,
    "bytes_per_token": 64,
    "prefill_tokens_per_s": 20_000,
    "inter_token_s": 0.005,
}
TORCH_ENGINE = {"kind": "torch", "block_size": 16, "kv_cache": "64MiB", "max_batch_tokens": 256}
VLLM_ENGINE = {
    "kind": "vllm",
    "args": {"enforce-eager": True, "kv-cache-memory-bytes": "64M", "max-num-seqs": 16, "block-size": 128},
}
"""Each of these nodes takes a core of its own, as far as there are. On a GPU all of them share it."""
ENGINES = {"sim": SIM_ENGINE, "torch": TORCH_ENGINE, "vllm": VLLM_ENGINE}
PATIENCE = {"stall_first_s": 60.0, "stall_gap_s": 30.0}
"""Of a router whose nodes share a busy machine with whatever else runs there."""
EngineKind = Literal["sim", "torch", "vllm"]
Prompt = str | list[int]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Streamed:
    """An answer that came as a stream of one choice. `first_token_s`: from sending to the first text or token."""

    text: str
    first_token_s: float
    usage: dict[str, Any]
    token_ids: list[int]
    """Empty, unless `return_token_ids` was asked for."""
    id: str
    finish_reason: str | None


class ClusterHandle:
    """A cluster that is up. Every method that asks something raises AssertionError for an answer that is not 200."""

    def __init__(
        self,
        config: ClusterConfig,
        plans: Sequence[ProcessPlan],
        launcher: Launcher,
        session: aiohttp.ClientSession,
        *,
        inner: aiohttp.ClientSession,
        admin: aiohttp.ClientSession,
    ) -> None:
        self.config = config
        self.plans = {plan.name: plan for plan in plans}
        """Of the processes that the launcher keeps up, by name."""
        self.launcher = launcher
        self.session = session
        """With the router."""
        self.inner = inner
        """With all others."""
        self.admin = admin
        """With the router as its operators."""

    @property
    def url(self) -> str:
        """The router's."""
        return self.launcher.router_url

    @property
    def operators_url(self) -> str:
        """Of the router, where it takes orders."""
        return operators_url_of(self.config)

    @property
    def metadata_url(self) -> str:
        """Of the metadata server; of several, the first."""
        return secured_url(self.config, metadata_urls(self.config.metadata_server)[0])

    def node_url(self, name: str) -> str:
        """Of a node's control API."""
        return internal_url(self.config, self.config.nodes[name].host, self.config.nodes[name].port)

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], dict[str, Any]]:
        """(status, headers, body) of a request to the router, whatever they are."""
        async with self.session.post(self.url + path, json=body) as reply:
            return reply.status, dict(reply.headers), await reply.json()

    async def complete(self, prompt: Prompt, **fields: Any) -> dict[str, Any]:
        """POST /v1/completions; the answer's body."""
        status, _, body = await self.post("/v1/completions", self._completion(prompt, fields))
        assert status == 200, body
        return body

    async def chat(self, messages: Sequence[dict[str, str]], **fields: Any) -> dict[str, Any]:
        """POST /v1/chat/completions; the answer's body."""
        status, _, body = await self.post("/v1/chat/completions", self._chat(messages, fields))
        assert status == 200, body
        return body

    async def stream(self, prompt: Prompt, **fields: Any) -> Streamed:
        """As `complete`, in a stream that must end properly."""
        return await self._gather(self.events("/v1/completions", self._completion(prompt, fields)))

    async def stream_chat(self, messages: Sequence[dict[str, str]], **fields: Any) -> Streamed:
        """As `chat`, in a stream that must end properly."""
        return await self._gather(self.events("/v1/chat/completions", self._chat(messages, fields)))

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The events of a stream, up to `[DONE]`, usage in the last. Closing it leaves the server in mid-answer."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with self.session.post(self.url + path, json=body) as reply:
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                if data and not data.startswith(b":"):
                    yield json.loads(data)
        raise AssertionError("the stream ended without [DONE]")

    async def explain(self, request_id: str) -> dict[str, Any]:
        """The router's record of one request: route, legs, retries."""
        return await self._json(f"{self.operators_url}/v1/requests/{request_id}")

    async def status(self) -> dict[str, Any]:
        """The router's view of the cluster."""
        return await self._json(f"{self.operators_url}/v1/cluster")

    async def cache_stats(self) -> CacheStats:
        """GET /v1/cache/stats of the router."""
        return msgspec.convert(await self._json(f"{self.operators_url}/v1/cache/stats"), CacheStats)

    async def stats(self) -> Stats:
        """The metadata server's; of several partitions what all of them say."""
        return merged_stats([await self.stats_of(one) for one in partitions_of(self.config.metadata_server)])

    async def stats_of(self, partition: PartitionConfig) -> Stats:
        """One partition's; of several servers, the leader's."""
        *urls, last = (secured_url(self.config, url) for url in urls_of(partition))
        for url in urls:
            with suppress(aiohttp.ClientError, AssertionError):
                return msgspec.msgpack.decode(await self._get(f"{url}/v1/stats"), type=Stats)
        return msgspec.msgpack.decode(await self._get(f"{last}/v1/stats"), type=Stats)

    async def node_info(self, name: str) -> NodeReport:
        """A node about itself and its engine."""
        return msgspec.msgpack.decode(await self._get(f"{self.node_url(name)}/v1/info"), type=NodeReport)

    async def metrics(self, url: str) -> dict[str, float]:
        """`name{labels}` -> value, from the /metrics of the router, a node or the metadata server."""
        lines = (await self._get(f"{url}/metrics")).decode().splitlines()
        samples = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in samples}

    async def until(self, check: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        """Poll until `check` is true and return what it returned. One that cannot reach a server is not true yet.

        Raises AssertionError with its last answer.
        """
        last: object = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        last = value = await check()
                        if value:
                            return value
                    except (aiohttp.ClientError, AssertionError) as error:
                        last = error
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise AssertionError(f"not true within {timeout_s:g} s: {check}; last: {last!r}") from None

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that are kept up."""
        return [plan.name for plan in self.plans.values() if plan.kind is ProcessKind.NODE]

    async def all_ready(self) -> bool:
        """Whether router and metadata server know every node that is kept up, with its engine."""
        status = await self.status()
        healthy = {node["id"] for node in status["nodes"] if node["healthy"]}
        if not any(plan.kind is ProcessKind.METADATA_SERVER for plan in self.plans.values()):
            return healthy == set(self.nodes)
        for partition in partitions_of(self.config.metadata_server):
            stats = await self.stats_of(partition)
            if {node.id for node in stats.nodes if node.fingerprint or node.role == "store"} != set(self.nodes):
                return False
        return bool(status["metadata_connected"]) and healthy == set(self.nodes)

    def _completion(self, prompt: Prompt, fields: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.config.model.name, "prompt": prompt, **fields}

    def _chat(self, messages: Sequence[dict[str, str]], fields: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.config.model.name, "messages": list(messages), **fields}

    async def _gather(self, events: AsyncGenerator[dict[str, Any]]) -> Streamed:
        began = asyncio.get_running_loop().time()
        first_token_s, request_id, reason = 0.0, "", None
        usage: dict[str, Any] = {}
        text: list[str] = []
        token_ids: list[int] = []
        async with aclosing(events):
            async for event in events:
                assert "error" not in event, event
                request_id, usage = event["id"], event.get("usage") or usage
                for choice in event["choices"]:
                    assert reason is None, "text after the finish reason"
                    piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                    ids = choice.get("token_ids") or []
                    if (piece or ids) and not first_token_s:
                        first_token_s = asyncio.get_running_loop().time() - began
                    text.append(piece)
                    token_ids += ids
                    reason = choice["finish_reason"]
        return Streamed("".join(text), first_token_s, usage, token_ids, request_id, reason)

    async def _json(self, url: str) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(await self._get(url))
        return body

    async def _get(self, url: str) -> bytes:
        outer = self.admin if url.startswith(self.operators_url) else self.inner
        session = self.session if url.startswith(self.url) else outer
        async with session.get(url, headers={"Accept": "application/msgpack"}) as reply:
            assert reply.status == 200, await reply.read()
            return await reply.read()


def write_config(
    folder: Path,
    *,
    engine: EngineKind = "sim",
    model: Path | None = None,
    name: str | None = None,
    prefillers: int = 2,
    decoders: int = 2,
    transport: str = "auto",
) -> Path:
    """A cluster file in `folder`, all on free ports, with nodes `prefill-0`, `decode-0`, ..."""
    names = [f"prefill-{i}" for i in range(prefillers)] + [f"decode-{i}" for i in range(decoders)]
    metadata_port, router_port, *node_ports = free_ports(2 + len(names))
    roles = ["prefiller"] * prefillers + ["decoder"] * decoders
    nodes = {
        node: {"role": role, "port": port, "segment": "16MiB"}
        for node, role, port in zip(names, roles, node_ports, strict=True)
    }
    if engine == "vllm":
        for index, node in enumerate(nodes.values()):
            if vllm_on_gpu():
                node["engine"] = {"kind": "vllm", "args": {"gpu-memory-utilization": GPU_SHARE}}
            else:
                bind = {"VLLM_CPU_OMP_THREADS_BIND": str(index % (os.cpu_count() or 1))}
                node["engine"] = {"kind": "vllm", "env": bind}
    config = {
        "cluster": folder.name[:40] or "test",
        "model": {"path": str(model) if model else "sim", "name": name or (model.name if model else "sim")},
        "engine": ENGINES[engine],
        "kv": {"chunk_tokens": 128 if engine == "vllm" else 64},
        "nodes": nodes,
        "transport": transport,
        "store": {"reserve_ttl_s": 5.0, "read_lease_s": 5.0, "retire_grace_s": 0.5},
        "metadata_server": {"port": metadata_port, "node_ttl_s": 2.0, "records": {"kind": "memory"}},
        "router": {"port": router_port, "probe_interval_s": 0.25, "drain_s": 3.0, **PATIENCE},
        "service": {"drain_s": 3.0, "start_s": READY_S[engine]},
    }
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@asynccontextmanager
async def cluster(
    tmp_path: Path,
    *,
    engine: EngineKind = "sim",
    model: Path | None = None,
    name: str | None = None,
    prefillers: int = 2,
    decoders: int = 2,
    transport: str = "auto",
    overrides: Sequence[str] = (),
    without: Collection[str] = (),
    place: Callable[[ProcessPlan], ProcessPlan] = lambda plan: plan,
    key: str = "",
) -> AsyncIterator[ClusterHandle]:
    """A cluster that serves; every process of it has ended afterwards. `overrides`: as after `--set`. `without`: names
    of processes that the config has but that are not there (the launcher would start them again). `place` may have a
    process run elsewhere than here. `key`: an admin's API key, if the router asks for one."""
    file = write_config(
        tmp_path,
        engine=engine,
        model=model,
        name=name,
        prefillers=prefillers,
        decoders=decoders,
        transport=transport,
    )
    config = load_config(file, overrides)
    plans = [place(plan) for plan in plan_processes(config, file, overrides) if plan.name not in without]
    launcher = Launcher(
        config, file, log_dir=tmp_path / "logs", plans=plans, on_line=lambda who, line: print(f"{who}: {line}")
    )
    async with AsyncExitStack() as stack:
        tls = config.router.tls
        trust, headers = open_trust(trust_source(config)), {"Authorization": f"Bearer {key}"} if key else {}
        connector = aiohttp.TCPConnector(limit=0, ssl=True if tls is None else pinned_context(tls.cert))
        session = await stack.enter_async_context(router_session(trust=trust, connector=connector, headers=headers))
        connector = aiohttp.TCPConnector(limit=0, ssl=internal_ssl(trust))
        inner = await stack.enter_async_context(http_session(trust=trust, connector=connector))
        admin = await stack.enter_async_context(operators_session(trust=trust, headers=headers))
        await stack.enter_async_context(launcher)
        handle = ClusterHandle(config, plans, launcher, session, inner=inner, admin=admin)
        if handle.nodes:  # the router is not healthy without one
            await launcher.wait_ready(READY_S[engine])
        await handle.until(handle.all_ready, READY_S[engine])
        yield handle
