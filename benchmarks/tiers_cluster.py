"""What benchmarks.tiers measures from end to end: whole clusters with a tier, started again after all was computed."""

import json
import os
import random
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.vllm_pd_client import MODEL_NAME, Measured, ask
from benchmarks.vllm_pd_kvferry import all_healthy
from benchmarks.vllm_pd_processes import START_S, Setting, free_port, process, until
from kvcore.ports import base_url

SAVED_S = 120.0
FIRST_TOKEN_ID = 100


class Prompts:
    """Random tokens: no two have a prefix in common."""

    def __init__(self, model: Path, tokens: int) -> None:
        config = json.loads((model / "config.json").read_text())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self.kv_bytes = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * tokens
        """Of one prompt, in float32."""
        self._vocab, self._tokens, self._dice = config["vocab_size"], tokens, random.Random(0)

    def fresh(self, count: int) -> list[list[int]]:
        """The next ones."""
        return [self._dice.choices(range(FIRST_TOKEN_ID, self._vocab), k=self._tokens) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs in the nodes."""

    python: Path
    section: Mapping[str, Any]
    """`engine` of the cluster file."""
    chunk_tokens: int
    roles: tuple[str, ...] = ("prefiller", "decoder")

    @property
    def is_vllm(self) -> bool:
        """Whether each node is to have a core of its own."""
        return self.section["kind"] == "vllm"


@dataclass(frozen=True, slots=True)
class Cluster:
    """One that runs."""

    setting: Setting
    url: str
    node_urls: tuple[str, ...]

    async def ask(self, prompt: list[int]) -> Measured:
        """Through the router."""
        return await ask(self.setting.session, self.url, prompt)

    async def saved(self, tier: str) -> int:
        """Chunks that the nodes have put into a tier since they began, or found there."""
        total = 0
        for url in self.node_urls:
            async with self.setting.session.get(f"{url}/v1/info", headers={"Accept": "application/json"}) as response:
                report = json.loads(await response.read())
            counts = [one["counts"] for one in report["tiers"] if one["name"] == tier]
            total += sum(one.get("saved", 0) + one.get("there", 0) for one in counts)
        return total

    async def until_saved(self, tiers: Iterable[str], num_chunks: int) -> None:
        """Wait until each tier has so many. TimeoutError with nothing lost if one has not."""

        async def done() -> bool:
            return all([await self.saved(tier) >= num_chunks for tier in tiers])

        await until(done, SAVED_S)


@asynccontextmanager
async def cluster(
    setting: Setting, engine: Engine, tiers: Mapping[str, Any], *, segment_bytes: int
) -> AsyncIterator[Cluster]:
    """Nodes with `tiers`, which fill no segment before they are asked."""
    nodes: dict[str, dict[str, Any]] = {}
    for core, role in enumerate(engine.roles):
        name = f"{role}-{engine.roles[:core].count(role)}"
        nodes[name] = {"role": role, "port": free_port(), "segment": segment_bytes}
        if engine.is_vllm:
            bound = {"VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1))}
            nodes[name]["engine"] = {"kind": "vllm", "env": bound}
    config = {
        "cluster": "tiers",
        "model": {"path": str(setting.model), "name": MODEL_NAME, "dtype": "float32"},
        "engine": dict(engine.section),
        "kv": {"chunk_tokens": engine.chunk_tokens},
        "nodes": nodes,
        "tiers": {**tiers, "warm_up": 0.0, "wait_s": 30.0},
        "metadata_server": {"port": free_port(), "records": {"kind": "memory"}},
        "router": {"port": free_port()},
        "service": {"start_s": START_S},
    }
    file = setting.folder / "tiers.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [str(engine.python), "-m", "kvferry", "up", str(file), "--log-dir", str(setting.folder / "logs")]
    router = base_url("127.0.0.1", config["router"]["port"])  # type: ignore[index]
    urls = tuple(base_url("127.0.0.1", node["port"]) for node in nodes.values())
    subject = Cluster(setting, router, urls)

    async with process(setting, "kvferry-up", command, f"{router}/health"):
        await until(lambda: all_healthy(setting.session, router, num_nodes=len(nodes)), START_S)
        yield subject
