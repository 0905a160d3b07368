"""The systems that are measured, except kvferry: each a context that brings its processes up and ends them.

Every vLLM node is started with the same arguments (`Setting.vllm_words`) and computes on one core: the prefiller, and
the plain vLLM, on the first, the decoder on the second. Everything else goes where the kernel puts it.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from benchmarks.vllm_pd_client import MODEL_NAME, Measured, ask
from benchmarks.vllm_pd_processes import Setting, free_port, process, until
from benchmarks.vllm_pd_threads import place_threads
from kvcore.ports import base_url

SETTLE_S = 1.0
"""Between the first node's answer and the second request, for what the first still has to store."""
KEEP_S = 20.0
FIRST_CORE, SECOND_CORE = 0, 1


class System(Protocol):
    """What is measured."""

    async def ask(self, prompt: list[int]) -> Measured:
        """A fresh prompt, as a client asks it."""
        ...

    async def reuse(self, first: list[int], second: list[int]) -> Measured | None:
        """`first` is computed by one node; then `second`, which begins alike, is asked of another: that is measured.
        None: the system keeps no KV for other nodes."""
        ...

    async def decode(self, prompt: list[int]) -> float | None:
        """Measured.decoder_ttft_s, of systems for which `ask` does not tell it: one prompt more."""
        ...


@dataclass(frozen=True, slots=True)
class Server:
    """One HTTP server. `group`: its process group."""

    url: str
    session: aiohttp.ClientSession
    group: int

    async def ask(self, prompt: list[int]) -> Measured:
        """See System."""
        return await ask(self.session, self.url, prompt)

    async def reuse(self, first: list[int], second: list[int]) -> Measured | None:
        """See System."""
        return None

    async def decode(self, prompt: list[int]) -> float | None:
        """See System."""
        return None


@asynccontextmanager
async def vllm(
    setting: Setting,
    python: Path,
    name: str,
    core: int,
    *,
    words: Sequence[str] = (),
    connector: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = {},
) -> AsyncIterator[Server]:
    """One `vllm serve`."""
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(setting.model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", MODEL_NAME, "--enable-prompt-tokens-details"]
    command += ["--disable-uvicorn-access-log", *setting.vllm_words(), *words]
    if connector is not None:
        command += ["--kv-transfer-config", json.dumps({"kv_role": "kv_both", **connector})]
    url = base_url("127.0.0.1", port)
    bound = {"VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1)), **environment}
    async with process(setting, name, command, f"{url}/health", bound) as group:
        yield Server(url, setting.session, group)


@dataclass(frozen=True, slots=True)
class Bare(Server):
    """A vLLM that takes a prompt's KV from shared memory."""

    kept: Path

    async def ask(self, prompt: list[int]) -> Measured:
        """The prompt is computed and kept; then asked again, and its KV copied back: that is measured."""
        self.kept.unlink(missing_ok=True)
        await ask(self.session, self.url, prompt, max_tokens=1, kv_transfer_params={"bare": "keep"})
        await until(lambda: asyncio.to_thread(self.kept.exists), KEEP_S)
        measured = await ask(self.session, self.url, prompt, kv_transfer_params={"bare": "load"})
        return replace(measured, decoder_ttft_s=measured.ttft_s)


@asynccontextmanager
async def bare_copy(setting: Setting, python: Path) -> AsyncIterator[Bare]:
    """The yardstick; without prefix caching, which would find the prompt itself."""
    file = setting.shared / "bare.kv"
    connector = {
        "kv_connector": "BareCopyConnector",
        "kv_connector_module_path": "benchmarks.vllm_pd_bare",
        "kv_connector_extra_config": {"file": str(file), "file_bytes": setting.context_bytes},
    }
    words = ["--no-enable-prefix-caching"]
    async with vllm(setting, python, "bare", SECOND_CORE, words=words, connector=connector) as server:
        yield Bare(server.url, server.session, server.group, file.with_suffix(".kept"))


@dataclass(frozen=True, slots=True)
class Pair(Server):
    """A prefiller and a decoder behind the proxy, whose address `url` is."""

    prefiller: Server
    decoder: Server
    stores: bool

    async def ask(self, prompt: list[int]) -> Measured:
        """Through the proxy, which also tells how long each leg took."""
        measured = await ask(self.session, self.url, prompt)
        async with self.session.get(f"{self.url}/legs/{measured.request_id}") as response:
            spent = await response.json()
        if self.stores:
            spent["decode.cached_tokens"] = measured.cached_tokens or 0
        return replace(measured, spent=spent, decoder_ttft_s=spent["decode_first_s"])

    async def reuse(self, first: list[int], second: list[int]) -> Measured | None:
        """Each node is asked directly."""
        if not self.stores:
            return None
        await ask(self.session, self.prefiller.url, first, max_tokens=1)
        await asyncio.sleep(SETTLE_S)
        return await self.decoder.ask(second)


@asynccontextmanager
async def pair(
    setting: Setting, python: Path, name: str, connector: Mapping[str, Any], environments: Sequence[Mapping[str, str]]
) -> AsyncIterator[Pair]:
    """Two vLLM servers with one connector, and the proxy."""
    async with AsyncExitStack() as stack:
        prefiller, decoder = [
            await stack.enter_async_context(
                vllm(setting, python, f"{name}-{role}", core, connector=connector, environment=environment)
            )
            for role, core, environment in zip(
                ("prefill", "decode"), (FIRST_CORE, SECOND_CORE), environments, strict=True
            )
        ]
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.vllm_pd_proxy", "--port", str(port)]
        command += ["--prefiller", prefiller.url, "--decoder", decoder.url]
        url = base_url("127.0.0.1", port)
        group = await stack.enter_async_context(process(setting, f"{name}-proxy", command, f"{url}/health"))
        yield Pair(url, setting.session, group, prefiller, decoder, stores=name == "lmcache")


@asynccontextmanager
async def nixl(setting: Setting, python: Path) -> AsyncIterator[Pair]:
    """NixlConnector over UCX's shared memory and TCP; each node computes on its core (vllm_pd_threads)."""
    environments = [
        {
            "UCX_NET_DEVICES": "lo",
            "UCX_TLS": "self,sm,tcp",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        }
        for _ in range(2)
    ]
    connector = {"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"}
    async with pair(setting, python, "nixl", connector, environments) as nodes:
        for node, core in ((nodes.prefiller, FIRST_CORE), (nodes.decoder, SECOND_CORE)):
            await place_threads(node.group, core % (os.cpu_count() or 1))
        yield nodes


LMCACHE_WORDS = {
    "default": ["--supported-transfer-mode", "auto"],
    "shm": ["--supported-transfer-mode", "auto", "--no-l1-use-lazy", "--shm-name", "kvferry_bench"],
}


@asynccontextmanager
async def lmcache(setting: Setting, python: Path, mode: str) -> AsyncIterator[Pair]:
    """LMCacheMPConnector in both nodes, one `lmcache server` beside them. `mode`: a key of LMCACHE_WORDS."""
    port, http_port, metrics_port = free_port(), free_port(), free_port()
    command = [str(python), "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http_port), "--prometheus-port", str(metrics_port)]
    command += ["--l1-size-gb", "2", "--eviction-policy", "LRU", *LMCACHE_WORDS[mode]]
    connector = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
    }
    quiet = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}
    server = process(setting, "lmcache-server", command, f"{base_url('127.0.0.1', http_port)}/healthcheck", quiet)
    async with server, pair(setting, python, "lmcache", connector, [quiet, quiet]) as nodes:
        yield nodes
