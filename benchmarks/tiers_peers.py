"""vLLM with LMCache over Redis or over a disk, as its documentation starts them, for benchmarks.tiers."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.vllm_pd_processes import Setting, free_port, process
from benchmarks.vllm_pd_systems import FIRST_CORE, Server, vllm
from kvcore.ports import base_url

CHUNK_TOKENS = 256
"""LMCache's default; a chunk of its holds two of kvferry's here."""
_QUIET = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1"}


def adapters(redis_port: int, disk: Path) -> dict[str, Mapping[str, Any]]:
    """Its second level, by the name of the tier that it is held against."""
    return {
        "redis": {"type": "resp", "host": "127.0.0.1", "port": redis_port},
        "disk": {"type": "fs_native", "base_path": str(disk), "use_odirect": True},
    }


@asynccontextmanager
async def lmcache(setting: Setting, python: Path, adapter: Mapping[str, Any]) -> AsyncIterator[Server]:
    """One vLLM and one `lmcache server`, both new: what they find is in the second level."""
    port, http_port, metrics_port = free_port(), free_port(), free_port()
    command = [str(python), "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http_port), "--prometheus-port", str(metrics_port)]
    command += ["--l1-size-gb", "2", "--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
    command += ["--chunk-size", str(CHUNK_TOKENS), "--l2-adapter", json.dumps(adapter)]
    connector = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
    }
    health = f"{base_url('127.0.0.1', http_port)}/healthcheck"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(process(setting, "lmcache-server", command, health, _QUIET))
        yield await stack.enter_async_context(
            vllm(setting, python, "lmcache", FIRST_CORE, connector=connector, environment=_QUIET)
        )
