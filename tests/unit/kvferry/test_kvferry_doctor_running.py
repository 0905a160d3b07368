"""The doctor beside a running cluster: its ports are its own, its memory is taken already, its problems are told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvcore.config.fields import ByteSize
from kvcore.config.partitions import PartitionConfig
from kvcore.config.schema import (
    ClusterConfig,
    MetadataServerConfig,
    ModelConfig,
    NodeConfig,
    RouterConfig,
    SimEngineConfig,
)
from kvcore.config.security import SecretConfig, SecurityConfig
from kvcore.ports import listen
from kvcore.trust.secret_text import new_secret
from kvcore.types import Role
from kvferry.doctor.checks import check_memory, check_ports, check_running
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.records import check_records
from kvferry.doctor.running import RunningParts, find_running
from kvferry.doctor.security import check_security

NODE = {"id": "d0", "role": "decoder", "control_url": "http://x", "incarnation": 1, "cluster": "c"}
STATS = {
    **{"epoch": "e", "nodes": [NODE], "segments": [], "objects": 0, "reservations": 0, "read_leases": 0},
    **{"waiters": 0, "counters": {}},
}
ROUTER: dict[str, Any] = {"cluster": "c", "nodes": [{"id": "d0", "role": "decoder", "healthy": True}]}


@pytest.fixture
async def serve():
    async with AsyncExitStack() as stack:

        async def serve(path: str, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> int:
            async def handler(_: web.Request) -> web.Response:
                text = json.dumps(answer)
                return web.Response(text=text, status=status, content_type="application/json", headers=headers)

            app = web.Application()
            app.router.add_get(path, handler)
            server = TestServer(app)
            await server.start_server()
            stack.push_async_callback(server.close)
            assert server.port is not None
            return server.port

        yield serve


def cluster(router: int, metadata: int, node: int, segment: int = 1 << 20) -> ClusterConfig:
    return ClusterConfig(
        cluster="c",
        model=ModelConfig(path="sim", name="sim"),
        engine=SimEngineConfig(num_blocks=16),
        nodes={"d0": NodeConfig(role=Role.DECODER, port=node, segment=ByteSize(segment))},
        metadata_server=MetadataServerConfig(port=metadata),
        router=RouterConfig(port=router),
    )


async def running_cluster(serve, *, router=ROUTER, stats=STATS, node=NODE, segment=1 << 20) -> Context:
    ports = await serve("/v1/cluster", router), await serve("/v1/stats", stats), await serve("/v1/info", {"node": node})
    config = cluster(*ports, segment=segment)
    return Context(config, running=await find_running(config))


async def test_the_ports_of_a_running_cluster_are_its_own(serve):
    context = await running_cluster(serve)
    assert context.running.names == {"router", "metadata_server", "d0"}
    findings = check_ports(context)
    assert [finding.ok for finding in findings] == [True] * 3
    assert all("is held by this cluster, which runs" in finding.detail for finding in findings)
    (finding,) = check_running(context)
    assert finding.ok and finding.detail == "it runs, and uses every node"


@pytest.mark.parametrize(
    ("changed", "strangers"),
    [
        ({"router": {**ROUTER, "cluster": "other"}}, {"router"}),
        ({"router": [1]}, {"router"}),
        ({"stats": {**STATS, "nodes": [{**NODE, "cluster": "other"}]}}, {"metadata_server"}),
        ({"node": {**NODE, "cluster": "other"}}, {"d0"}),
        ({"node": {**NODE, "id": "d1"}}, {"d0"}),
    ],
)
async def test_ports_that_another_clusters_processes_hold_are_wrong(serve, changed, strangers):
    findings = check_ports(await running_cluster(serve, **changed))
    assert {finding.subject.removeprefix("port ") for finding in findings if not finding.ok} == strangers


async def test_a_metadata_server_that_stands_by_is_the_clusters_own(serve):
    ports = await serve("/v1/cluster", ROUTER), await serve("/v1/stats", STATS), await serve("/v1/info", {"node": NODE})
    follower = await serve("/v1/stats", {"error": {"code": "not_leader"}}, 503)
    stranger = await serve("/v1/stats", {"error": {"code": "overloaded"}}, 503)
    config = cluster(*ports)
    standbys = [f"127.0.0.1:{follower}", f"127.0.0.1:{stranger}"]
    server = msgspec.structs.replace(config.metadata_server, standbys=standbys)
    config = msgspec.structs.replace(config, metadata_server=server)
    findings = check_ports(Context(config, running=await find_running(config)))
    assert [finding.subject for finding in findings if not finding.ok] == ["port metadata_server.standbys[1]"]


async def test_each_partitions_server_is_the_clusters_own_and_each_ones_records_are_looked_at(serve):
    ports = [await serve("/v1/stats", STATS) for _ in range(2)]
    strange = await serve("/v1/stats", {**STATS, "nodes": [{**NODE, "cluster": "other"}]})
    config = cluster(await serve("/v1/cluster", ROUTER), 0, await serve("/v1/info", {"node": NODE}))
    partitions = [PartitionConfig(name=name, port=port) for name, port in zip("abc", [*ports, strange], strict=True)]
    config = msgspec.structs.replace(config, metadata_server=MetadataServerConfig(partitions=partitions))
    context = Context(config, running=await find_running(config))
    wrong = [finding.subject for finding in check_ports(context) if not finding.ok]
    assert wrong == ["port metadata_server.partitions[2]"]
    found = [finding.detail for finding in check_records(context)]
    assert len(found) == 3 and all(f"records-{port}.sqlite" in said for port, said in zip(ports, found, strict=False))


async def test_where_nothing_runs_nothing_is_found_and_held_ports_are_wrong():
    with closing(listen("127.0.0.1", 0)) as silent:
        config = cluster(silent.getsockname()[1], 9, 9)
        running = await find_running(config, timeout_s=0.1)
        assert running == RunningParts()
        finding = check_ports(Context(config, running=running))[0]
    assert not finding.ok and "is in use" in finding.detail
    assert check_running(Context(config, running=running)) == []


LISTENS = """
import socket, time
it = socket.create_server(("127.0.0.1", 0))
print(it.getsockname()[1], flush=True)
time.sleep(60)
"""
FILE = "model: {path: sim, name: sim}\nengine: {kind: sim}\nnodes: {d0: {role: decoder, port: 1}}\ncluster: "


@contextmanager
def silent_process(folder: Path, name: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """One that is started as those of a cluster are, and its port; it takes connections and answers none."""
    (folder / "c.yaml").write_text(FILE + name)
    (folder / "listens.py").write_text(LISTENS)
    words = [sys.executable, "listens.py", "--config", "c.yaml"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def finding_of(port: int, **how: Any) -> Finding:
    return check_ports(Context(cluster(port, 9, 9), **how))[0]


def test_a_process_of_this_cluster_that_hangs_or_is_stopped_is_no_stranger(tmp_path):
    with silent_process(tmp_path, "c") as (process, port):
        hangs = finding_of(port)
        assert not hangs.ok and f"own process {process.pid} (" in hangs.detail
        assert "which runs and does not answer" in hangs.detail and f"kill -USR1 {process.pid}" in hangs.remedy
        assert "is in use by pid" in finding_of(port, all_here=True).detail, "nobody has asked it"
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        stopped = finding_of(port)
    assert not stopped.ok and stopped.detail.endswith("which is stopped (SIGSTOP)")
    assert stopped.remedy.startswith(f"`kill -CONT {process.pid}` lets it go on")


def test_one_of_another_cluster_or_of_none_is_a_stranger(tmp_path):
    for text in ("another", "c\nnothing: of ours"):
        with silent_process(tmp_path, text) as (_, port):
            assert finding_of(port).remedy == "stop it, or set another port (router.port)"


async def test_what_a_running_cluster_has_taken_is_not_needed_again(serve):
    context = await running_cluster(serve, segment=1 << 50)
    (finding,) = check_memory(context)
    assert finding.ok and "0 B of it segments" in finding.detail
    assert not check_memory(Context(context.config))[0].ok


async def test_what_the_router_says_is_wrong_is_told(serve):
    away = {"id": "d1", "role": "decoder", "healthy": False, "reason": "its tokenizer is not the router's"}
    router = {**ROUTER, "nodes": [*ROUTER["nodes"], away], "problems": ["prefiller p0 can serve no decoder"]}
    findings = check_running(await running_cluster(serve, router=router))
    assert [(finding.ok, finding.detail) for finding in findings] == [
        (False, "decoder d1 is not used: its tokenizer is not the router's"),
        (False, "prefiller p0 can serve no decoder"),
    ]


async def test_a_routers_processes_are_its_own_and_who_is_away_is_told(serve):
    lines = [{"name": "router.1"}, {"name": "router.2", "problem": "Connection refused"}]
    with closing(listen("127.0.0.1", 0)) as held:
        config = cluster(await serve("/v1/cluster", {**ROUTER, "processes": lines}), 9, 9)
        admin, own = config.router.port, held.getsockname()[1]
        router = msgspec.structs.replace(config.router, port=1, admin_port=admin, processes=2, process_port=own)
        config = msgspec.structs.replace(config, router=router)
        context = Context(config, running=await find_running(config))
        findings = {finding.subject: finding for finding in check_ports(context)}
        for name in ("router.processes[0]", "router.admin_port"):
            assert "is held by this cluster, which runs" in findings[f"port {name}"].detail
        (finding,) = check_running(context)
        assert finding.detail == "process router.2 of the router is not there: Connection refused"


def test_a_node_whose_name_begins_like_a_routers_is_no_router_that_runs():
    config = cluster(1, 2, 3)
    alone = Context(config, running=RunningParts(frozenset({"routerless", "metadata_server"})))
    assert check_running(alone) == []
    other = Context(config, running=RunningParts(frozenset({"routers[0]"})))
    assert [finding.detail for finding in check_running(other)] == ["it runs, and uses every node"]


@pytest.mark.parametrize(
    ("ahead_s", "said"), [(-47, "47 s behind"), (-16, "16 s behind"), (40, "40 s ahead of"), (9, "")]
)
async def test_a_clock_that_is_far_off_is_named_with_its_machine_and_by_how_much(serve, ahead_s, said, tmp_path):
    port = await serve("/health", {}, headers={"Date": formatdate(time.time() + ahead_s, usegmt=True)})
    (tmp_path / "secret").write_text(new_secret())
    (tmp_path / "secret").chmod(0o600)
    config = cluster(9, 9, port)
    security = SecurityConfig(secret=SecretConfig(file=str(tmp_path / "secret")))
    secured = msgspec.structs.replace(config, security=security)
    context = Context(secured, running=await find_running(secured, timeout_s=20.0))
    assert abs(context.running.clocks["127.0.0.1"] - ahead_s) < 10
    finding = next(one for one in check_security(context) if "clock" in one.subject)
    assert finding.ok is not bool(said)
    if said:
        number = int(said.split()[0])
        told = re.search(r"is (\d+) s (behind|ahead of) this machine's; .* 30 s apart are refused", finding.detail)
        assert told is not None and abs(int(told[1]) - number) < 10 and told[2] in said
        assert finding.subject == "clock of 127.0.0.1"
    assert not any("clock" in one.subject for one in check_security(Context(config, running=context.running)))


async def test_a_machine_that_says_no_time_is_not_judged(serve):
    port = await serve("/health", {}, headers={"Date": "yesterday"})
    assert (await find_running(cluster(9, 9, port))).clocks == {}
