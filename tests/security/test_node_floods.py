"""Nodes that flood the metadata server and the router, or name addresses and numbers that no node has."""

import asyncio
import logging

import msgspec
import pytest
from aiohttp import web
from support.metadata_words import keys, new_state, put, registration
from support.router_fakes import FakeNodes, Rig, cluster_config, make_rig, two_and_two

from kvcore.clock import ManualClock
from kvcore.errors import (
    DeadlineExceededError,
    MetadataProtocolError,
    NodeRefusedError,
    NodeUnavailableError,
    OverloadedError,
)
from kvcore.identity import ClusterIdentity
from kvcore.types import NodeInfo, Role
from metadata_server.bounds import check_register
from metadata_server.core import MetadataCore
from metadata_server.index.limits import IndexLimits
from metadata_server.limits import ServerLimits
from metadata_server.messages import Event, EventKind
from nodeapi.client import MAX_REPORT_BYTES, HttpNodeClient
from nodeapi.messages import NodeReport
from router.nodes.cluster import Cluster
from router.nodes.limits import NodeHealthLimits
from router.nodes.prober import Prober

NOWHERE = [
    "http://169.254.169.254:80",
    "http://169.254.169.254/latest/meta-data",
    "http://[fe80::1]:8000",
    "http://[::ffff:169.254.169.254]:80",
    "http://0.0.0.0:8000",
    "http://user:password@10.0.0.1:8000",
    "http://10.0.0.1:8000/v1/secret",
    "http://10.0.0.1:8000?a=b",
    "file:///etc/passwd",
    "gopher://10.0.0.1:70",
    "http://10.0.0.1:99999",
    "http://",
    "//10.0.0.1:8000",
]


def test_leases_of_nobody_have_a_share_of_their_number():
    state = new_state(limits=IndexLimits(max_read_leases=100))
    state.register(registration("a"), 0.0)
    put(state, "a", [1], 0.0)
    granted = [state.match(keys(1), 0.0, lease_s=3600.0).lease_id for _ in range(1000)]
    assert sum(map(bool, granted)) <= 25, "another thousand matches would have frozen the cache for an hour"
    assert state.match(keys(1), 0.0, lease_s=5.0, node_id="a", incarnation=1).lease_id
    state.renew_all_nodes(31.0)
    assert state.match(keys(1), 31.0, lease_s=3600.0).lease_id, "theirs end soon"


def test_leases_of_one_node_have_a_bound_and_an_end():
    state = new_state(limits=IndexLimits(max_leases_per_node=50))
    for name in ("a", "b"):
        state.register(registration(name), 0.0)
    put(state, "a", [1], 0.0)
    flood = [state.match(keys(1), 0.0, lease_s=3600.0, node_id="a", incarnation=1).lease_id for _ in range(200)]
    assert sum(map(bool, flood)) == 50
    assert state.match(keys(1), 0.0, lease_s=5.0, node_id="b", incarnation=1).lease_id, "others have their own"
    state.renew_all_nodes(301.0)
    assert state.match(keys(1), 301.0, lease_s=5.0, node_id="a", incarnation=1).lease_id, "no lease lasts an hour"


def test_live_nodes_have_a_bound():
    state = new_state(limits=IndexLimits(max_nodes=20))
    for number in range(20):
        state.register(registration(f"n{number}"), 0.0)
    with pytest.raises(OverloadedError):
        state.register(registration("one-more"), 0.0)
    state.register(registration("n3"), 1.0)


async def test_event_streams_of_one_address_have_a_bound():
    core = MetadataCore(new_state(), ManualClock(), ServerLimits(max_subscribers=4, max_subscribers_per_client=3))
    held = [core.events("", 0, "10.0.0.1") for _ in range(3)]
    for stream in held:
        assert await anext(stream)
    with pytest.raises(OverloadedError):
        await anext(core.events("", 0, "10.0.0.1"))
    other = core.events("", 0, "10.0.0.2")
    assert await anext(other), "a router elsewhere gets one"
    await held.pop().aclose()
    again = core.events("", 0, "10.0.0.1")
    assert await anext(again)
    for stream in (*held, other, again):
        await stream.aclose()


async def test_refused_nodes_are_a_few_lines_of_the_log(caplog: pytest.LogCaptureFixture):
    core = MetadataCore(new_state(identity=ClusterIdentity("ours", "m")), ManualClock())
    with caplog.at_level(logging.WARNING):
        for number in range(500):
            request = registration(f"stranger-{number}")
            node = msgspec.structs.replace(request.node, cluster="theirs")
            with pytest.raises(NodeRefusedError):
                core.register(msgspec.structs.replace(request, node=node), 1000.0)
    assert sum("node_refused" in line for line in caplog.messages) <= 65


@pytest.mark.parametrize("url", NOWHERE)
def test_a_node_at_an_address_that_no_node_has_is_refused(url: str):
    request = registration("a")
    node = msgspec.structs.replace(request.node, control_url=url)
    with pytest.raises(MetadataProtocolError, match="control_url"):
        check_register(msgspec.structs.replace(request, node=node))


@pytest.mark.parametrize("url", ["http://10.0.0.1:8000", "https://node-7.example:8443", "http://[2001:db8::1]:80", ""])
def test_ordinary_addresses_are_taken(url: str):
    request = registration("a")
    check_register(msgspec.structs.replace(request, node=msgspec.structs.replace(request.node, control_url=url)))


@pytest.mark.parametrize("url", NOWHERE)
async def test_the_router_asks_nothing_of_such_an_address(url: str):
    rig = await make_rig()
    info = NodeInfo(id="x", role=Role.DECODER, control_url=url, incarnation=1)
    rig.cluster.on_events([Event(kind=EventKind.NODE_UP, seq=1, node_id="x", node=info)])
    assert "x" not in rig.cluster.nodes


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1%25lo]", "224.0.0.1"])
async def test_no_connection_is_made_to_such_an_address(host: str):
    client = HttpNodeClient(connect_timeout_s=2.0, max_connections=4)
    with pytest.raises(NodeUnavailableError, match=r"no node has|reached"):
        await client.info(f"http://{host}:80", timeout_s=1.0)
    await client.aclose()


async def test_a_report_without_end_is_given_up_at_its_bound():
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(64):
            await response.write(bytes(MAX_REPORT_BYTES // 8))
        return response

    app = web.Application()
    app.add_routes([web.get("/v1/info", endless)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    client = HttpNodeClient(connect_timeout_s=2.0, max_connections=4)
    with pytest.raises(NodeUnavailableError, match="more than"):
        await client.info(f"http://127.0.0.1:{runner.addresses[0][1]}", timeout_s=5.0)
    await client.aclose()
    await runner.cleanup()


class BlackHoles(FakeNodes):
    """Addresses that swallow what they are sent, beside nodes that answer."""

    waiting = most_waiting = asked = 0

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        if not url.startswith("http://hole"):
            return await super().info(url, timeout_s=timeout_s)
        self.asked += 1
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        try:
            await asyncio.sleep(timeout_s)
        finally:
            self.waiting -= 1
        raise DeadlineExceededError("no answer")


async def test_a_flood_of_nodes_that_swallow_probes_is_asked_a_few_at_a_time():
    nodes = BlackHoles(two_and_two().nodes)
    rig = await make_rig(nodes, node_limits=NodeHealthLimits(strangers_at_once=16), connect_timeout_s=0.05)
    urls = [f"http://hole-{at}:80" for at in range(1500)]
    flood = [NodeInfo(id=url[7:], role=Role.DECODER, control_url=url, incarnation=1) for url in urls]
    rig.cluster.on_events([Event(kind=EventKind.NODE_UP, seq=1, node_id=node.id, node=node) for node in flood])
    for _ in range(3):
        await rig.prober.probe()
    assert nodes.most_waiting == 16 and nodes.asked <= 16 * 3
    assert _usable(rig) == {"p0", "p1", "d0", "d1"}, "who was known before is asked in each round"


async def test_a_node_whose_numbers_make_no_sense_serves_nobody_and_harms_nobody():
    nodes = two_and_two()
    rig = await make_rig(nodes)
    report = rig.cluster.nodes["d0"].report
    assert report is not None and report.engine is not None
    for change in ({"vocab_size": 0}, {"max_context": -1}, {"max_context": 1 << 60}):
        lie = msgspec.structs.replace(report, engine=msgspec.structs.replace(report.engine, **change))
        rig.cluster.reported(rig.cluster.nodes["d0"], lie)
        assert _usable(rig) == {"p0", "p1", "d1"}
        assert "makes no sense" in str(rig.cluster.nodes["d0"].problem)
    spec = msgspec.structs.replace(report.engine.kv_spec, chunk_tokens=0)
    lie = msgspec.structs.replace(report, engine=msgspec.structs.replace(report.engine, kv_spec=spec))
    rig.cluster.reported(rig.cluster.nodes["d0"], lie)
    assert _usable(rig) == {"p0", "p1", "d1"}
    rig.cluster.reported(rig.cluster.nodes["d0"], report)
    assert _usable(rig) == {"p0", "p1", "d0", "d1"}


async def test_a_node_may_not_widen_what_the_routers_file_allows():
    nodes = two_and_two()
    config = cluster_config(nodes.nodes)
    narrow = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, max_context=100))
    cluster = Cluster(narrow, ManualClock())
    await Prober(narrow.router, cluster, nodes, ManualClock(), NodeHealthLimits()).probe()
    node = cluster.nodes["p0"]
    report = node.report
    assert report is not None and report.engine is not None and report.engine.max_context > 100
    assert cluster.max_context() == 100
    said = NodeInfo(id="p0", role=Role.DECODER, control_url="http://10.6.6.6:1", incarnation=9)
    cluster.on_events([Event(kind=EventKind.NODE_UP, seq=1, node_id="p0", node=said)])
    assert cluster.nodes["p0"] is node and node.role is Role.PREFILLER and node.url != said.control_url
    other = msgspec.structs.replace(report, node=msgspec.structs.replace(report.node, role=Role.DECODER))
    cluster.reported(node, other)
    assert "is decoder p0, not prefiller p0" in str(node.problem)


def _usable(rig: Rig) -> set[str]:
    return {node.id for node in rig.cluster.nodes.values() if rig.cluster.why_unused(node) is None}
