"""kvferry as a system of the comparison: `kvferry up` with one prefiller and one decoder, both vLLM."""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks.vllm_pd_client import ASK_S, MODEL_NAME, NEW_TOKENS, Measured, ask
from benchmarks.vllm_pd_processes import BLOCK, MAX_CONTEXT, START_S, Setting, free_port, process, until
from benchmarks.vllm_pd_systems import FIRST_CORE, SECOND_CORE, SETTLE_S, Server
from kvcore.chunk_keys import usable_chunks
from kvcore.ports import base_url
from nodeapi.client import HttpNodeClient
from nodeapi.messages import GenerateRequest, Handoff, PrefillRequest, TokenDelta
from nodeapi.sampling import SamplingParams

SEGMENT_CONTEXTS = 6
"""A node's segment holds so many of the longest prompts: nothing is evicted that is still to be measured."""


@dataclass(frozen=True, slots=True)
class KVFerry(Server):
    """A cluster; `url` is its router's, the others are those of the nodes' control APIs."""

    client: HttpNodeClient
    prefiller: str
    decoder: str

    async def ask(self, prompt: list[int]) -> Measured:
        """Through the router, whose record tells where the time went."""
        measured = await ask(self.session, self.url, prompt)
        async with self.session.get(f"{self.url}/v1/requests/{measured.request_id}") as response:
            record = await response.json()
        return replace(measured, spent=spent_of(record))

    async def reuse(self, first: list[int], second: list[int]) -> Measured:
        """The prefiller computes `first`; `second` goes through the router, which leaves it to the decoder alone."""
        await self._prefill(first)
        await asyncio.sleep(SETTLE_S)
        return await self.ask(second)

    async def decode(self, prompt: list[int]) -> float | None:
        """The prefiller computes the prompt; once all of it is stored, the decoder is asked directly."""
        await self._prefill(prompt)
        await asyncio.sleep(SETTLE_S)
        handoff = Handoff(num_chunks=usable_chunks(len(prompt), BLOCK), wait_s=ASK_S)
        sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        request = GenerateRequest(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            sampling=sampling,
            handoff=handoff,
            deadline_s=ASK_S,
        )
        first = _FirstToken()
        began = time.perf_counter()
        await self.client.generate(self.decoder, request, first, first_s=ASK_S, gap_s=ASK_S)
        return None if first.at is None else first.at - began

    async def _prefill(self, prompt: list[int]) -> None:
        request = PrefillRequest(request_id=uuid.uuid4().hex, prompt_token_ids=prompt, deadline_s=ASK_S)
        await self.client.prefill(self.prefiller, request, timeout_s=ASK_S)


class _FirstToken:
    """A DeltaReader that notes when the first token came, `at`."""

    at: float | None = None

    def take(self, delta: TokenDelta) -> bool:
        """See DeltaReader."""
        if delta.token_ids and self.at is None:
            self.at = time.perf_counter()
        return True

    async def ready(self) -> bool:
        """See DeltaReader."""
        return True


def spent_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The seconds of a router's record: `prefill.compute_s`, `decode.wait_s`, ...; and what each leg computed."""
    spent: dict[str, float] = {}
    for leg in record["legs"]:
        for name, value in (leg["timings"] or {}).items():
            spent[f"{leg['kind']}.{name}"] = value
        spent[f"{leg['kind']}.computed_tokens"] = leg["computed_tokens"] or 0
    return spent


def cluster_file(setting: Setting) -> Path:
    """Nodes on a core each, vLLM with the same arguments as everywhere."""
    args = {
        "block-size": BLOCK,
        "max-num-batched-tokens": 2048,
        "enforce-eager": True,
        "kv-cache-memory-bytes": setting.kv_cache_bytes,
    }
    nodes = {
        name: {
            "role": role,
            "port": free_port(),
            "segment": SEGMENT_CONTEXTS * setting.context_bytes,
            "engine": {"kind": "vllm", "env": {"VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1))}},
        }
        for name, role, core in (("prefill-0", "prefiller", FIRST_CORE), ("decode-0", "decoder", SECOND_CORE))
    }
    config = {
        "cluster": "vllm-pd",
        "model": {"path": str(setting.model), "name": MODEL_NAME, "dtype": "float32", "max_context": MAX_CONTEXT},
        "engine": {"kind": "vllm", "args": args},
        "kv": {"chunk_tokens": BLOCK},
        "nodes": nodes,
        "metadata_server": {"port": free_port(), "records": {"kind": "memory"}},
        "router": {"port": free_port()},
        "service": {"start_s": START_S},
    }
    file = setting.folder / "kvferry.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@asynccontextmanager
async def kvferry(setting: Setting, python: Path) -> AsyncIterator[KVFerry]:
    """As a user starts it, with `python -m kvferry up`."""
    file = cluster_file(setting)
    config = yaml.safe_load(file.read_text())
    router = base_url("127.0.0.1", config["router"]["port"])
    prefiller, decoder = (base_url("127.0.0.1", node["port"]) for node in config["nodes"].values())
    command = [str(python), "-m", "kvferry", "up", str(file), "--log-dir", str(setting.folder / "kvferry-logs")]
    client = HttpNodeClient(connect_timeout_s=5.0, max_connections=8)
    async with process(setting, "kvferry-up", command, f"{router}/health") as group, aclosing(client):
        await until(lambda: all_healthy(setting.session, router, num_nodes=2), START_S)
        yield KVFerry(router, setting.session, group, client, prefiller, decoder)


async def all_healthy(session: aiohttp.ClientSession, router: str, *, num_nodes: int) -> bool:
    """Whether the router knows so many nodes, and all of them are well."""
    async with session.get(f"{router}/v1/cluster") as response:
        nodes = (await response.json())["nodes"]
    return len(nodes) == num_nodes and all(node["healthy"] for node in nodes)
