"""Two metadata servers share the index, as processes: one is killed with -9 under load, or taken over from."""

import asyncio
import json
import os
import random
import signal
import sys
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
from support.cluster import ClusterHandle, cluster
from support.etcd_server import etcd_server, with_etcd
from support.ports import free_ports
from test_cluster_chaos import RESTART_S, ask, load, make_prompt

from kvcore.config.servers import partitions_of
from kvcore.process.service import EXIT_CONFIG

pytestmark = pytest.mark.slow
LEASE_S = 3.0


def overrides(ports: list[int], *, standby: int | None = None, **more: object) -> tuple[str, ...]:
    partitions = [
        {"name": name, "port": port, "standbys": [f"127.0.0.1:{standby}"] if standby and name == "a" else []}
        for name, port in zip("ab", ports, strict=True)
    ]
    section = {"partitions": partitions, "node_ttl_s": 2.0, "records": {"kind": "memory"}, "timeout_s": 0.5, **more}
    return (f"metadata_server={json.dumps(section)}",)


async def objects(subject: ClusterHandle) -> list[int]:
    """Chunks that each partition knows."""
    return [(await subject.stats_of(one)).objects for one in partitions_of(subject.config.metadata_server)]


async def hits_come_back(subject: ClusterHandle, draw: random.Random) -> None:
    """A prompt of chunks in both partitions is found whole where it was stored."""
    prompt = make_prompt(draw, 64 * 12)
    before = await objects(subject)
    await ask(subject, prompt, 4)

    async def stored() -> bool:
        return all(now > then for now, then in zip(await objects(subject), before, strict=True))

    async def found() -> bool:
        return (await ask(subject, prompt, 4, seed=2))["cached"] == 64 * 11

    await subject.until(stored, 60)
    await subject.until(found, 60)


async def nothing_is_held(subject: ClusterHandle) -> bool:
    stats = await subject.stats()
    return stats.reservations == stats.read_leases == stats.waiters == 0


async def test_one_of_two_partitions_is_killed_and_comes_back_and_every_request_is_answered(tmp_path):
    ports = free_ports(2)
    async with cluster(tmp_path, prefillers=1, decoders=2, overrides=overrides(ports)) as subject:
        draw = random.Random(5)
        await hits_come_back(subject, draw)
        async with load(subject) as running:
            for _ in range(2):
                await running.reach(running.answered + 20)
                pid = subject.launcher.pids["metadata-server-b"]
                os.kill(pid, signal.SIGKILL)
                await running.reach(running.answered + 5)
                await subject.launcher.wait_restarted("metadata-server-b", pid, RESTART_S)
                await subject.until(subject.all_ready, RESTART_S)
        await subject.until(lambda: nothing_is_held(subject), 60)
        await hits_come_back(subject, draw)
        assert (await subject.status())["requests"]["failed"] == 0


@with_etcd
async def test_a_partition_with_a_standby_is_taken_over_within_two_leases(tmp_path: Path):
    first, second, standby = free_ports(3)
    with etcd_server(1) as etcd:
        records = {"kind": "etcd", "endpoints": etcd.urls, "timeout_s": 1.0}
        settings = overrides([first, second], standby=standby, records=records, lease_s=LEASE_S)
        async with cluster(tmp_path, prefillers=1, decoders=1, overrides=settings) as subject:
            draw = random.Random(6)
            await hits_come_back(subject, draw)
            names = {first: "metadata-server-a", standby: "metadata-server-a-2"}

            async def leader() -> tuple[int, str]:
                """The port of who leads, and the epoch of its term; whichever of them it is: one that was killed is
                started again, and may be as early as the other."""
                for port in names:
                    with suppress(aiohttp.ClientError):
                        async with subject.session.get(f"http://127.0.0.1:{port}/health") as reply:
                            body = await reply.json(content_type=None)
                            if body["leads"]:
                                return port, body["epoch"]
                return 0, ""

            async def leads() -> tuple[int, str]:
                found = await leader()
                assert found[0]
                return found

            old, term = await subject.until(leads, 60)
            async with load(subject) as running:
                await running.reach(20)
                os.kill(subject.launcher.pids[names[old]], signal.SIGKILL)
                began = asyncio.get_running_loop().time()

                async def taken_over() -> bool:
                    return (await leader())[1] not in ("", term)

                await subject.until(taken_over, 60)
                took_s = asyncio.get_running_loop().time() - began
                await subject.until(subject.all_ready, RESTART_S)
            print(f"takeover took {took_s:.2f} s")
            assert took_s <= 10 * LEASE_S, "two leases on a machine that has nothing else to do"
            await hits_come_back(subject, draw)
            assert (await subject.status())["requests"]["failed"] == 0
            file, others = tmp_path / "cluster.yaml", free_ports(2)
            (whole,) = overrides(others, records=records)
            await refused(file, whole.replace('"b"', '"c"'), f"127.0.0.1:{others[0]}")


async def refused(file: Path, override: str, at: str) -> None:
    """A server of another set than that of the records ends at once, and says both."""
    command = [sys.executable, "-m", "metadata_server", "--config", str(file), "--set", override, "--at", at]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        _, said = await asyncio.wait_for(process.communicate(), 60.0)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == EXIT_CONFIG
    assert b"the index has partitions a, b, and this file says partitions a, c" in said
