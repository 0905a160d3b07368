"""What docs/operations.md tells an operator to do, done: add a node, stop one in mid-stream, replace a machine."""

import asyncio
import json
import os
import random
import re
import shlex
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
from kvcore.clock import SystemClock
from kvcore.config.schema import SimEngineConfig
from metadata_server.cache_messages import NodeOrderRequest
from metadata_server.connect import connect_client, endpoints_of
from nodeapi.sampling import SamplingParams

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


async def test_a_node_is_added_and_stopped_while_clients_stream(tmp_path: Path) -> None:
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


def commands(kind: str) -> list[list[str]]:
    """Of the page's blocks of a kind, without the file that they name."""
    page = (ROOT / "docs" / "operations.md").read_text()
    blocks = re.findall(rf"<!-- runs: {kind} -->\n```bash\n(.*?)```", page, re.S)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [[word for word in line[1:] if word not in ("--config", "two.yaml")] for line in lines]


async def kvferry(subject: ClusterHandle, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command about this cluster."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvferry", *words, "--url", subject.url, cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def nodes_by_state(subject: ClusterHandle) -> dict[str, str]:
    code, out, err = await kvferry(subject, "nodes", "ls", "--json")
    assert code == 0, err
    return {row["id"]: row["state"] for row in json.loads(out)["nodes"]}


async def until_settled(subject: ClusterHandle, name: str, state: str) -> None:
    """Until the node is in this state, and the others serve."""

    async def settled() -> bool:
        found = await nodes_by_state(subject)
        return found.pop(name, "") == state and set(found.values()) == {"ready"}

    await subject.until(settled, SOON_S)


async def decoded(subject: ClusterHandle, name: str) -> int:
    """Tokens, by the node's present engine."""
    stats = (await subject.node_info(name)).stats
    assert stats is not None
    return stats.counters.get("decode_tokens", 0)


async def test_a_machine_is_replaced_as_the_page_says(tmp_path: Path) -> None:
    """The order outlives router, metadata server and node; the last step is refused while the node is alive."""
    records = f"metadata_server.records={{kind: sqlite, path: {tmp_path}/records.sqlite}}"
    async with cluster(tmp_path, prefillers=1, decoders=2, overrides=["engine.inter_token_s=0.02", records]) as subject:
        for words in commands("nodes"):
            code, out, err = await kvferry(subject, *words)
            assert code == 0 and "decode-0" in out, (words, err)
        drain, ls, remove = commands("replace")
        assert (await kvferry(subject, *drain))[0] == 0
        for process in ("metadata-server", "decode-0", "router"):
            pid = subject.launcher.pids[process]
            os.kill(pid, signal.SIGKILL)
            await subject.launcher.wait_restarted(process, pid, SOON_S)
        await until_settled(subject, "decode-0", "drained")
        before = await decoded(subject, "decode-0")
        await asyncio.gather(*(ask(subject, seed) for seed in range(3)))
        assert await decoded(subject, "decode-0") == before, "it got no request"
        code, _, err = await kvferry(subject, *remove)
        assert code == 1 and "decode-0 is alive" in err
        os.kill(subject.launcher.pids["decode-0"], signal.SIGTERM)

        async def removed() -> bool:
            return (await kvferry(subject, *remove))[0] == 0

        await subject.until(removed, SOON_S)
        assert "decode-0" not in await nodes_by_state(subject)
        new = {"role": "decoder", "port": subject.config.nodes["decode-0"].port, "segment": "16MiB"}
        async with started("decoder", file_with(tmp_path, **{"decode-0": new}), "decode-0"):
            await until_settled(subject, "decode-0", "ready")
            assert "decode-0" in (await kvferry(subject, *ls))[1]
            await ask(subject, 9)


async def test_full_segments_are_evened_out_and_every_prompt_is_hit_as_before(tmp_path: Path) -> None:
    """One decoder was drained while the prompts came; the engines' own memory holds two of them."""
    prompts = [[random.Random(seed).randrange(3, 250) for _ in range(64 * 8 + 1)] for seed in range(12)]
    greedy = {"max_tokens": 1, "temperature": 0, "ignore_eos": True}
    small = [f"nodes.{name}.segment=2MiB" for name in ("prefill-0", "decode-0", "decode-1")]
    overrides = ["engine.num_blocks=80", *small]
    async with cluster(tmp_path, prefillers=1, decoders=2, overrides=overrides) as subject:
        assert (await kvferry(subject, "nodes", "drain", "decode-1"))[0] == 0
        for prompt in prompts:
            await subject.complete(prompt, **greedy)
        assert (await kvferry(subject, "nodes", "undrain", "decode-1"))[0] == 0

        async def fills() -> list[float]:
            return [one.used_bytes / one.segment.size_bytes for one in (await subject.stats()).segments]

        before = await fills()
        assert max(before) - min(before) > 0.3
        plan, *runs = commands("rebalance")
        code, out, err = await kvferry(subject, *plan)
        assert code == 0 and "at most" in out and await fills() == before, (out, err)
        for words in runs:
            code, out, err = await kvferry(subject, *words)
            assert code == 0 and "all together" in out, (out, err)
        assert max(await fills()) - min(await fills()) < 0.05
        bodies = [await subject.complete(prompt, **greedy) for prompt in prompts]
        assert [body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in bodies] == [512] * len(prompts)


async def test_a_cluster_at_work_has_no_orphans_and_what_is_ordered_of_a_node_that_never_was_is_one(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, prefillers=1, decoders=1) as subject:
        await asyncio.gather(*(ask(subject, seed) for seed in range(3)))

        async def settled() -> bool:
            return (await kvferry(subject, "janitor"))[0] != 2

        await subject.until(settled, SOON_S)
        for words in commands("janitor"):
            code, out, err = await kvferry(subject, *words)
            assert code == 0 and not err and ("nothing is orphaned" in out or '"kinds":[]' in out), (words, out, err)
        metadata = connect_client(endpoints_of(subject.config.metadata_server), SystemClock())
        await metadata.order_node(NodeOrderRequest(node_id="ghost", action="drain"))
        await metadata.order_node(NodeOrderRequest(node_id="decode-0", action="drain"))
        code, out, _ = await kvferry(subject, "janitor", "--older", "0.001s")
        assert code == 1 and "1 drains and removals" in out and "ghost (drained)" in out
        code, out, _ = await kvferry(subject, "janitor", "--older", "0.001s", "--apply")
        assert code == 0 and "removed 1" in out
        assert [order.node_id for order in (await metadata.node_orders()).orders] == ["decode-0"]
        await metadata.aclose()


async def test_what_a_drained_node_has_moved_is_hit_after_it_was_stopped(tmp_path: Path) -> None:
    """And while it moves. The engines' own memory holds two of the prompts."""
    prompts = [[random.Random(seed).randrange(3, 250) for _ in range(64 * 8 + 1)] for seed in range(12)]
    greedy = {"max_tokens": 1, "temperature": 0, "ignore_eos": True}
    async with cluster(tmp_path, prefillers=1, decoders=2, overrides=["engine.num_blocks=80"]) as subject:
        for prompt in prompts:
            await subject.complete(prompt, **greedy)

        async def hits() -> list[int]:
            bodies = [await subject.complete(prompt, **greedy) for prompt in prompts]
            return [body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in bodies]

        async def chunks_there() -> int:
            return sum(
                line.num_replicas for line in (await subject.stats()).segments if line.segment.node_id == "decode-0"
            )

        assert await subject.until(chunks_there, SOON_S)
        assert (await kvferry(subject, "nodes", "drain", "--move", "decode-0"))[0] == 0
        assert await hits() == [512] * len(prompts)
        await until_settled(subject, "decode-0", "drained")
        assert not await chunks_there()
        os.kill(subject.launcher.pids["decode-0"], signal.SIGTERM)

        async def is_gone() -> bool:
            return "decode-0" not in {node.id for node in (await subject.stats()).nodes}

        await subject.until(is_gone, SOON_S)
        assert await hits() == [512] * len(prompts)
