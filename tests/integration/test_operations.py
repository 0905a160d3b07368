"""What docs/operations.md tells an operator to do, done: add a node, drain it in mid-stream, change a role."""

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cluster import ClusterHandle, cluster
from support.ports import free_ports

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.messages import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
SOON_S = 60.0
TOKENS = 500
"""10 s and more: far longer than a drain and the closing of connections take."""


def file_with(folder: Path, *, without: str = "", **nodes: dict[str, Any]) -> Path:
    """The cluster's file with other nodes, and `without` one that it had."""
    content = yaml.safe_load((folder / "cluster.yaml").read_text())
    content["nodes"].pop(without, None)
    content["nodes"] |= nodes
    content["service"]["drain_s"] = 0.3
    content["engine"]["inter_token_s"] = 0.02
    file = folder / f"with-{'-'.join(nodes)}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@asynccontextmanager
async def started(program: str, file: Path, node: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", program, "--config", str(file), "--node", node, cwd=ROOT
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def node_status(subject: ClusterHandle, name: str) -> dict[str, Any]:
    found = [node for node in (await subject.status())["nodes"] if node["id"] == name]
    return found[0] if found else {"healthy": False, "reason": None, "role": None, "running": None}


async def until_healthy(subject: ClusterHandle, name: str, role: str) -> None:
    async def is_healthy() -> bool:
        node = await node_status(subject, name)
        return node["healthy"] and node["role"] == role

    await subject.until(is_healthy, SOON_S)


async def ask(subject: ClusterHandle, seed: int) -> str:
    """A stream of TOKENS tokens, held against what they must be; returns its id."""
    prompt = [random.Random(seed).randrange(1, 50_000) for _ in range(40)]
    answer = await subject.stream(prompt, max_tokens=TOKENS, seed=seed, ignore_eos=True, return_token_ids=True)
    engine = subject.config.engine
    assert isinstance(engine, SimEngineConfig)
    sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=TOKENS, ignore_eos=True)
    assert answer.token_ids == expected_tokens(engine, prompt, sampling)[0]
    return answer.id


async def test_a_node_is_added_and_drained_while_clients_stream(tmp_path: Path) -> None:
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=["engine.inter_token_s=0.02"]) as subject:
        (port,) = free_ports(1)
        file = file_with(tmp_path, added={"role": "decoder", "port": port, "segment": "16MiB"})
        async with started("decoder", file, "added") as process:
            await until_healthy(subject, "added", "decoder")
            asking = [asyncio.create_task(ask(subject, seed)) for seed in range(6)]

            async def is_busy() -> bool:
                return bool((await node_status(subject, "added"))["running"])

            await subject.until(is_busy, SOON_S)
            process.send_signal(signal.SIGTERM)
            ids = await asyncio.gather(*asking)
            assert await asyncio.wait_for(process.wait(), SOON_S) == 0
        records = [await subject.explain(request_id) for request_id in ids]
        assert {record["state"] for record in records} == {"ok"}
        assert sum(record["retries"] for record in records) >= 1, (
            "nothing was under way on the node when it was drained"
        )
        assert not (await node_status(subject, "added"))["healthy"]


async def test_a_node_with_another_role_needs_another_name(tmp_path: Path) -> None:
    """The router that was started with the old file does not use it, and says so."""
    async with cluster(tmp_path, prefillers=1, decoders=1, without=["prefill-0"]) as subject:
        old = subject.config.nodes["prefill-0"]
        node = {"role": "decoder", "port": old.port, "segment": "16MiB"}
        async with started("decoder", file_with(tmp_path, **{"prefill-0": node}), "prefill-0"):

            async def why() -> str | None:
                reason = (await node_status(subject, "prefill-0"))["reason"] or ""
                return reason if "not prefiller prefill-0" in reason else None

            assert "is decoder prefill-0" in str(await subject.until(why, SOON_S))
        async with started("decoder", file_with(tmp_path, without="prefill-0", renamed=node), "renamed"):
            await until_healthy(subject, "renamed", "decoder")
