"""The doctor asks a running metadata server whose it is, and whether the names of this machine's nodes are free."""

import asyncio

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from support.metadata_rigs import Rig, metadata_rig
from support.metadata_words import registration
from support.ports import free_ports

from kvcore.config.schema import ClusterConfig, MetadataServerConfig, ModelConfig, NodeConfig, SimEngineConfig
from kvcore.identity import ClusterIdentity
from kvcore.types import Role
from kvferry.doctor.checks import ALL_CHECKS
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.joining import check_joining


def config_at(port: int, node_host: str = "127.0.0.1") -> ClusterConfig:
    return ClusterConfig(
        cluster="prod",
        model=ModelConfig(path="m", name="m"),
        engine=SimEngineConfig(),
        nodes={"d0": NodeConfig(role=Role.DECODER, host=node_host, port=8712)},
        metadata_server=MetadataServerConfig(port=port, timeout_s=1.0),
    )


async def findings(rig: Rig, node_host: str = "127.0.0.1", **context: bool) -> list[Finding]:
    assert rig.url is not None
    config = config_at(int(rig.url.rpartition(":")[2]), node_host)
    return list(await asyncio.to_thread(check_joining, Context(config, **context)))


@pytest.mark.parametrize(
    ("identity", "wrong"),
    [
        (ClusterIdentity("prod", "m"), ""),
        (ClusterIdentity(), ""),  # of an older version
        (ClusterIdentity("staging", "m"), "is of cluster 'staging', not 'prod'"),
        (ClusterIdentity("prod", "x"), "serves model 'x', not 'm' as the cluster 'prod' does"),
    ],
)
async def test_a_metadata_server_of_another_cluster_is_wrong(identity, wrong):
    async with metadata_rig("http", identity=identity) as rig:
        (finding,) = await findings(rig)
        there = f"the metadata server at {rig.url} {wrong}" if wrong else f"'prod' runs at {rig.url}, nodes alive: 0"
        assert (finding.subject, finding.ok, finding.detail) == ("cluster", not wrong, there)
        assert bool(finding.remedy) == bool(wrong)


@pytest.mark.parametrize(
    ("lives_at", "here", "said"),
    [
        ("http://10.0.0.7:8712", {}, "d0 is alive at http://10.0.0.7:8712, and in this file it is at http://127.0.0.1"),
        ("http://127.0.0.1:8712", {}, ""),  # itself: it runs already
        ("http://10.0.0.7:8712", {"node_host": "192.0.2.1"}, ""),  # another machine's node
        ("http://10.0.0.7:8712", {"node_host": "192.0.2.1", "all_here": True}, "d0 is alive at http://10.0.0.7:8712"),
    ],
)
async def test_a_name_that_another_process_has_is_wrong(lives_at, here, said):
    async with metadata_rig("http") as rig:
        request = registration("d0")
        node = msgspec.structs.replace(request.node, control_url=lives_at)
        await rig.client.register(msgspec.structs.replace(request, node=node))
        (finding,) = await findings(rig, **here)
        assert finding.ok == (not said) and said in finding.detail


async def test_a_server_that_is_not_there_yet_is_no_fault_and_another_program_there_is():
    (port,) = free_ports(1)
    (finding,) = await asyncio.to_thread(check_joining, Context(config_at(port)))
    assert finding == Finding("cluster", True, f"no metadata server answers at http://127.0.0.1:{port} yet")
    server = TestServer(web.Application())
    await server.start_server()
    (finding,) = await asyncio.to_thread(check_joining, Context(config_at(server.port or 0)))
    assert not finding.ok and "answered 404" in finding.detail
    await server.close()


def test_it_is_one_of_the_doctors():
    assert check_joining in ALL_CHECKS
