"""A whole node process's service at a metadata server that refuses it: what it says of itself, and that it comes in."""

import asyncio
import json
import re
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import msgspec
import pytest
from support.metadata_rigs import Rig, metadata_rig, until

from kvcore.config.fields import ByteSize
from kvcore.config.schema import (
    ClusterConfig,
    MetadataServerConfig,
    ModelConfig,
    NodeConfig,
    ServiceConfig,
    SimEngineConfig,
    TransportConfig,
)
from kvcore.identity import ClusterIdentity
from kvcore.process.service import Lifecycle
from kvcore.types import Role
from kvnode.limits import NodeLimits
from kvnode.service import draw_incarnation, run_node
from nodeapi.messages import NodeReport

LIMITS = NodeLimits(lease_first_backoff_s=0.005)


def config_at(rig: Rig) -> ClusterConfig:
    """One store node, of cluster `prod`, at an address of its own at each start."""
    assert rig.url is not None
    node = NodeConfig(role=Role.STORE, port=0, transfer_port=0, segment=ByteSize(1 << 16))
    return ClusterConfig(
        cluster="prod",
        model=ModelConfig(path="m", name="m"),
        engine=SimEngineConfig(),
        nodes={"s0": node},
        transport=TransportConfig(kind="tcp"),
        metadata_server=MetadataServerConfig(port=int(rig.url.rpartition(":")[2]), node_ttl_s=5.0),
        service=ServiceConfig(drain_s=0.1),
    )


@asynccontextmanager
async def running(rig: Rig, caplog):
    """The URL of a node that has started."""
    before = len(caplog.records)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        lifecycle = Lifecycle(stack, tasks)
        node = tasks.create_task(run_node(config_at(rig), "s0", lifecycle, limits=LIMITS))
        await until(lambda: lifecycle.is_ready)
        said = [record.getMessage() for record in caplog.records[before:] if record.getMessage().startswith("ready ")]
        yield re.search(r"url=(\S+)", said[-1]).group(1)
        lifecycle.stopping.set()
        await node
        await stack.aclose()


async def health(http: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with http.get(f"{url}/health") as reply:
        text = await reply.text()
        return reply.status, "" if reply.status == 200 else json.loads(text)["error"]["message"]


async def refusal(http: aiohttp.ClientSession, url: str) -> str:
    async with http.get(f"{url}/v1/info", headers={"Accept": "application/json"}) as reply:
        report = msgspec.json.decode(await reply.read(), type=NodeReport)
        assert report.node.cluster == "prod" and report.node.model == "", "a store has no model"
        return report.refused


async def until_said(caplog, what: str, times: int = 1) -> None:
    await until(lambda: sum(record.getMessage().startswith(what) for record in caplog.records) >= times)


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level("INFO")


async def test_a_node_of_another_cluster_says_so_until_the_server_is_corrected(caplog):
    async with (
        metadata_rig("http", identity=ClusterIdentity("staging")) as rig,
        aiohttp.ClientSession() as http,
        running(rig, caplog) as url,
    ):
        await until_said(caplog, "refused node=s0")
        said = f"node s0 at {url} is of cluster 'prod', not 'staging': correct the addresses"
        status, why = await health(http, url)
        assert status == 503 and why.startswith(f"the metadata server refuses this node: {said}")
        assert (await refusal(http, url)).startswith(said)
        await until(lambda: rig.core.state.counters["nodes_refused"] >= 3)
        assert [r.levelname for r in caplog.records if r.getMessage().startswith("refused node=s0")] == ["ERROR"]
        assert (await rig.client.nodes()).nodes == []
        rig.core.state._nodes.identity = ClusterIdentity("prod")
        await until_said(caplog, "registered node=s0")
        assert (await health(http, url), await refusal(http, url)) == ((200, ""), "")
        assert [node.id for node in (await rig.client.nodes()).nodes] == ["s0"]


async def test_a_second_process_of_a_name_waits_for_the_firsts_end(caplog):
    async with metadata_rig("http") as rig, aiohttp.ClientSession() as http, AsyncExitStack() as both:
        first = await both.enter_async_context(running(rig, caplog))
        await until_said(caplog, "registered node=s0")
        async with running(rig, caplog) as second:
            await until_said(caplog, "refused node=s0")
            status, why = await health(http, second)
            assert status == 503 and f"is alive at {first}, and this one is at {second}" in why
            assert await health(http, first) == (200, "")
            assert [node.control_url for node in (await rig.client.nodes()).nodes] == [first]
            await both.aclose()
            await until_said(caplog, "registered node=s0", times=2)
            assert await health(http, second) == (200, "")
            assert [node.control_url for node in (await rig.client.nodes()).nodes] == [second]


def test_incarnations_are_drawn_and_fit_what_reads_json():
    drawn = {draw_incarnation() for _ in range(200)}
    assert len(drawn) == 200 and all(0 < number < 1 << 53 for number in drawn)
