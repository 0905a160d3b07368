"""`kvferry doctor --probe` against servers that are not what they should be; the real ones are in tests/integration."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console
from support.ports import free_ports
from support.probe import probe_report

from kvcore.config.schema import (
    ClusterConfig,
    MetadataServerConfig,
    ModelConfig,
    NodeConfig,
    SimEngineConfig,
)
from kvcore.errors import ConfigError
from kvcore.handoff import HandoffKind
from kvcore.types import NodeInfo, Role
from kvferry.doctor.probe import run_probe
from metadata_server.messages import NodesReply
from nodeapi.messages import ProbeRequest

Handler = Callable[[web.Request], Awaitable[web.Response]]


class Cluster:
    """A metadata server that names `nodes`, and what each of them does when it is asked."""

    def __init__(self) -> None:
        self.servers: list[TestServer] = []
        self.nodes: list[NodeInfo] = []
        self.asked: list[tuple[str, str]] = []
        self.port = 0
        self.late_s = 10.0

    async def node(self, name: str, role: Role, answer: Handler | None = None) -> None:
        async def probe(http: web.Request) -> web.Response:
            request = msgspec.msgpack.decode(await http.read(), type=ProbeRequest)
            self.asked.append((name, request.peer))
            if answer is not None:
                return await answer(http)
            return web.Response(body=msgspec.msgpack.encode(probe_report(node=name, peer=request.peer)))

        url = await self._serve("POST", "/v1/probe", probe)
        self.nodes.append(NodeInfo(id=name, role=role, control_url=url, incarnation=1))

    async def metadata(self) -> None:
        async def nodes(_: web.Request) -> web.Response:
            return web.Response(body=msgspec.msgpack.encode(NodesReply(epoch="e", nodes=self.nodes, segments=[])))

        self.port = urlsplit(await self._serve("GET", "/v1/nodes", nodes)).port or 0

    def config(self, *names: str, **fields: object) -> ClusterConfig:
        return ClusterConfig(
            cluster="c",
            model=ModelConfig(path="sim", name="sim"),
            engine=SimEngineConfig(),
            nodes={name: NodeConfig(role=Role.DECODER, port=1) for name in names},
            metadata_server=MetadataServerConfig(port=self.port, timeout_s=1.0),
            **fields,  # type: ignore[arg-type]
        )

    async def probe(self, *names: str) -> tuple[int, str]:
        out = io.StringIO()
        code = await run_probe(self.config(*names), Console(file=out, width=160), pair_s=0.05, late_s=self.late_s)
        return code, out.getvalue()

    async def _serve(self, method: str, path: str, handler: Handler) -> str:
        app = web.Application()
        app.router.add_route(method, path, handler)
        server = TestServer(app)
        await server.start_server()
        self.servers.append(server)
        return str(server.make_url("")).rstrip("/")


@pytest.fixture
async def cluster():
    made = Cluster()
    await made.metadata()
    yield made
    for server in made.servers:
        await server.close()


async def refused(_: web.Request) -> web.Response:
    body = {"error": {"code": "peer_unreachable", "message": "segment d0.1: its owner went away", "retryable": True}}
    return web.Response(status=503, body=msgspec.msgpack.encode(body))


async def of_another_kind(_: web.Request) -> web.Response:
    return web.Response(status=404, text="404: Not Found")


async def never(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def test_every_engine_is_asked_for_every_other_node_and_shown(cluster):
    for name, role in (("p0", Role.PREFILLER), ("d0", Role.DECODER), ("s0", Role.STORE)):
        await cluster.node(name, role)
    code, out = await cluster.probe("p0", "d0", "s0")
    assert code == 0 and cluster.asked == [("p0", "d0"), ("p0", "s0"), ("d0", "p0"), ("d0", "s0")]
    assert "100 us" in out and "2.50 GB/s" in out and "eth0" in out and "64.0 MiB" in out
    assert out.count("ok    ") == 4


async def test_a_refusal_is_told_with_its_pair_and_the_others_are_measured(cluster):
    await cluster.node("p0", Role.PREFILLER, refused)
    await cluster.node("d0", Role.DECODER)
    code, out = await cluster.probe("p0", "d0")
    assert code == 1 and "not measured" in out
    assert "wrong p0 -> d0  segment d0.1: its owner went away" in out and "-> is the peer up" in out
    assert "ok    d0 -> p0" in out


async def test_a_warning_is_no_failure(cluster):
    async def slow(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.msgpack.encode(probe_report(put_rate=1e6)))

    await cluster.node("p0", Role.PREFILLER, slow)
    await cluster.node("s0", Role.STORE)
    code, out = await cluster.probe("p0", "s0")
    assert code == 0 and "warn  p0 -> s0  put 0.00 GB/s, below half of 3.12 GB/s, the rate of eth0" in out


async def test_a_node_that_does_not_answer_is_asked_once(cluster):
    cluster.late_s = 0.05
    await cluster.node("p0", Role.PREFILLER, never)
    for name in ("d0", "d1"):
        await cluster.node(name, Role.DECODER)
    code, out = await cluster.probe("p0", "d0", "d1")
    assert code == 1 and [asked for asked in cluster.asked if asked[0] == "p0"] == [("p0", "d0")]
    assert "wrong p0 -> d0  p0 did not answer within 0.1 s" in out
    assert "wrong p0 -> d1  not asked: p0 did not answer before" in out


async def test_a_node_that_has_gone_is_told_as_the_system_says_it(cluster):
    await cluster.node("d0", Role.DECODER)
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    cluster.nodes.append(NodeInfo(id="p0", role=Role.PREFILLER, control_url=url, incarnation=1))
    code, out = await cluster.probe("d0", "p0")
    assert code == 1 and f"wrong p0 -> d0  p0 is not there: Connection refused ({url})" in out


async def test_a_node_of_another_version_is_told_as_such(cluster):
    await cluster.node("p0", Role.PREFILLER, of_another_kind)
    await cluster.node("s0", Role.STORE)
    code, out = await cluster.probe("p0", "s0")
    assert code == 1 and "need the same version" in out


async def test_a_node_of_the_file_that_is_not_up_is_named(cluster):
    await cluster.node("d0", Role.DECODER)
    code, out = await cluster.probe("d0", "p0")
    assert code == 1 and "wrong p0  in the file, but the metadata server does not know it" in out
    code, out = await cluster.probe("d0")
    assert code == 0 and "no pair to measure" in out


async def test_without_a_metadata_server_nobody_is_asked(cluster):
    cluster.port = free_ports(1)[0]
    code, out = await cluster.probe("d0")
    assert code == 1 and f"wrong metadata server http://127.0.0.1:{cluster.port}" in out
    assert "-> start the metadata server" in out


async def test_where_no_store_of_ours_moves_the_kv_there_is_nothing_to_probe(cluster):
    config = msgspec.structs.replace(cluster.config("d0"), handoff=HandoffKind.NIXL)
    with pytest.raises(ConfigError, match="nothing of ours to probe"):
        await run_probe(config, Console(file=io.StringIO()))
