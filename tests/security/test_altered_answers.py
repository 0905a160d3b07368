"""Somebody on the network changes what servers of the cluster answer, or says again what he heard: with a secret nobody
takes it."""

import asyncio
import secrets as random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from urllib.parse import urlsplit

import msgspec
import pytest
from aiohttp import web
from support.altering_proxy import altering
from support.delta_readers import deltas_of
from support.fake_engine import FakeEngine, generate_request, prefill_request
from support.metadata_words import new_state

from kvcore.clock import SystemClock
from kvcore.errors import KVFerryError, MetadataUnavailableError, NodeUnavailableError
from kvcore.process.asgi import AsgiServer
from kvcore.process.proven_app import ProvenApp
from kvcore.telemetry import Metrics
from kvcore.trust.http_proof import RequestVerifier
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secrets import Secrets
from kvcore.types import NodeInfo, Role
from kvnode.answers import ProvenCalls
from kvnode.control_api import ControlApi
from metadata_server.core import MetadataCore
from metadata_server.http_transport import HttpEventSource, HttpMetadataTransport
from metadata_server.messages import EventBatch, LeaveRequest, NodesReply, RegisterRequest
from metadata_server.protocol import encode
from metadata_server.shell.app import create_app
from nodeapi.client import HttpNodeClient
from nodeapi.messages import NodeReport, ProbeReport, ProbeRequest

SECURED = ClusterTrust("here", Secrets((random.token_bytes(32),)))
NODE = NodeInfo(id="d0", role=Role.DECODER, control_url="http://10.0.0.1:8100", incarnation=1)
each = pytest.mark.parametrize("trust", [OPEN, SECURED], ids=["open", "secured"])


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


@asynccontextmanager
async def metadata(trust: ClusterTrust) -> AsyncIterator[int]:
    """One that knows a node."""
    clock = SystemClock()
    core = MetadataCore(new_state(), clock)
    core.register(RegisterRequest(node=NODE, segments=[], ttl_s=60.0), clock.now())
    app = create_app(core, clock, Metrics(), 1 << 20)
    shell = app if trust is OPEN else ProvenApp(app, RequestVerifier(trust, clock, None))
    server = AsgiServer(shell, "127.0.0.1", 0)
    await server.start()
    try:
        yield port_of(server.url)
    finally:
        core.stop()
        await server.aclose()


@asynccontextmanager
async def node(trust: ClusterTrust) -> AsyncIterator[int]:
    engine = FakeEngine()

    async def report() -> NodeReport:
        return NodeReport(node=NODE, engine=engine.info, stats=await engine.stats())

    async def nothing(_: ProbeRequest) -> ProbeReport:
        raise NodeUnavailableError("it does not measure")

    async def metrics() -> bytes:
        return b""

    api = ControlApi(engine=lambda: engine, report=report, metrics=metrics, health=lambda: None, probe=nothing)
    runner = api.runner(None if trust is OPEN else ProvenCalls(RequestVerifier(trust, SystemClock(), None)))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def whose_url(url: str, trust: ClusterTrust) -> bool:
    """Whether a client is told another address of the node."""
    transport = HttpMetadataTransport(url, trust=trust)
    try:
        reply = msgspec.msgpack.decode(await transport.call("/v1/nodes", b"", 5.0), type=NodesReply)
    finally:
        await transport.aclose()
    return reply.nodes[0].control_url == "http://10.6.6.6:8100"


async def which_events(url: str, trust: ClusterTrust) -> bool:
    """Whether a subscriber is told another epoch."""
    source = HttpEventSource(url, trust=trust)
    stream = source.batches("", 0)
    try:
        batch = msgspec.msgpack.decode(await anext(stream), type=EventBatch)
    finally:
        await stream.aclose()
        await source.aclose()
    return batch.epoch == "e6"


@asynccontextmanager
async def client_of(trust: ClusterTrust) -> AsyncIterator[HttpNodeClient]:
    client = HttpNodeClient(connect_timeout_s=5.0, max_connections=4, trust=trust)
    try:
        yield client
    finally:
        await client.aclose()


async def which_tokens(url: str, trust: ClusterTrust) -> bool:
    """Whether a router is given another token."""
    async with client_of(trust) as client:
        deltas = await deltas_of(client, url, generate_request(), 5.0)
    return any(delta.token_ids == [103] for delta in deltas)


async def what_was_computed(url: str, trust: ClusterTrust) -> bool:
    """Whether a router is told that more was stored."""
    async with client_of(trust) as client:
        return (await client.prefill(url, prefill_request(), timeout_s=5.0)).stored_chunks == 3


async def why_not(url: str, trust: ClusterTrust) -> bool:
    """Whether a router is given another reason."""
    async with client_of(trust) as client:
        try:
            await client.prefill(url, prefill_request("fail:overloaded"), timeout_s=5.0)
        except NodeUnavailableError:
            raise
        except KVFerryError as error:
            return error.code != "overloaded"
    return False


Serving = Callable[[ClusterTrust], AbstractAsyncContextManager[int]]
Work = Callable[[str, ClusterTrust], Awaitable[bool]]
ATTACKS: list[tuple[Serving, Work, bytes, bytes]] = [
    (metadata, whose_url, b"http://10.0.0.1:8100", b"http://10.6.6.6:8100"),
    (metadata, which_events, b"\xa2e1", b"\xa2e6"),
    (node, which_tokens, b"token_ids\x91\x02", b"token_ids\x91\x67"),
    (node, what_was_computed, b"stored_chunks\x02", b"stored_chunks\x03"),
    (node, why_not, b"overloaded", b"never_mind"),
]


@each
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack[1].__name__)
async def test_what_a_server_says_cannot_be_changed(trust, attack):
    serving, work, old, new = attack
    refusals = (MetadataUnavailableError, NodeUnavailableError)
    refused = pytest.raises(refusals, match="changed") if trust is SECURED else nullcontext()
    async with serving(trust) as port, altering(port, old, new) as url:
        with refused:
            assert await work(url, trust)
    async with serving(trust) as port, altering(port, b"?", b"?") as url:
        assert not await work(url, trust)


@each
async def test_what_was_heard_cannot_be_said_again(trust):
    """A node leaves and comes back; somebody who heard it sends the same bytes again."""
    heard = bytearray()
    async with metadata(trust) as port, altering(port, b"?", b"?", heard) as url:
        client = HttpMetadataTransport(url, trust=trust)
        try:
            leave = encode(LeaveRequest(node_id=NODE.id, incarnation=NODE.incarnation), json=False)
            await client.call("/v1/nodes/leave", leave, 5.0)
            said = bytes(heard)
            back = RegisterRequest(node=NODE, segments=[], ttl_s=60.0)
            await client.call("/v1/nodes/register", encode(back, json=False), 5.0)
            status = await say(port, said)
            reply = msgspec.msgpack.decode(await client.call("/v1/nodes", b"", 5.0), type=NodesReply)
        finally:
            await client.aclose()
    assert (status, bool(reply.nodes)) == ((b"401", True) if trust is SECURED else (b"200", False))


async def say(port: int, request: bytes) -> bytes:
    """The status of what is answered to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        async with asyncio.timeout(60):
            return (await reader.readline()).split()[1]
    finally:
        writer.close()
