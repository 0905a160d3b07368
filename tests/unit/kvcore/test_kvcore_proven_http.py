"""Servers of ours that ask for a proof, and clients that give one: ASGI and aiohttp, over real connections."""

import asyncio
import secrets as random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from kvcore.clock import SystemClock
from kvcore.errors import KVFerryError, MetadataProofError, MetadataUnavailableError, NodeUnavailableError
from kvcore.http.pool import HttpPool
from kvcore.ports import authorities_of, is_loopback
from kvcore.process import http_client
from kvcore.process.aiohttp_gate import BoundedRunner
from kvcore.process.asgi import AsgiServer
from kvcore.process.http_client import UnprovenReplyError, http_session
from kvcore.process.proven_app import ProvenApp
from kvcore.trust.http_proof import RequestVerifier
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secrets import Secrets
from kvnode.answers import ProvenCalls, answer_errors, check_read
from metadata_server.http_transport import HttpMetadataTransport
from nodeapi.client import HttpNodeClient

OLD, NEW = random.token_bytes(32), random.token_bytes(32)
Hits = list[bytes]


def trust(*secrets: bytes) -> ClusterTrust:
    return ClusterTrust("here", Secrets(secrets))


def of(secret: bytes) -> str:
    return trust(secret).secrets.newest.name


def verifier(holder: ClusterTrust) -> RequestVerifier:
    return RequestVerifier(holder, SystemClock(), None)


@asynccontextmanager
async def asgi(holder: ClusterTrust, hits: Hits) -> AsyncIterator[str]:
    async def echo(request: Request) -> Any:
        try:
            hits.append(await request.body())
        except KVFerryError as error:
            return PlainTextResponse(error.message, error.http_status)

        async def parts() -> AsyncIterator[bytes]:
            yield hits[-1]

        return StreamingResponse(parts())

    routes = [Route(path, echo, methods=["GET", "POST"]) for path in ("/echo", "/health")]
    app: Any = Starlette(routes=routes)
    server = AsgiServer(app if holder.secrets is None else ProvenApp(app, verifier(holder)), "127.0.0.1", 0)
    await server.start()
    try:
        yield server.url
    finally:
        await server.aclose()


@asynccontextmanager
async def node(holder: ClusterTrust, hits: Hits) -> AsyncIterator[str]:
    async def echo(request: web.Request) -> web.StreamResponse:
        hits.append(check_read(request, await request.read()))
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(hits[-1])
        return response

    app = web.Application(middlewares=[answer_errors])
    app.add_routes([web.route(method, path, echo) for method in ("GET", "POST") for path in ("/echo", "/health")])
    if holder.secrets is not None:
        ProvenCalls(verifier(holder)).add_to(app)
    async with plain(app) as url:
        yield url


@asynccontextmanager
async def plain(app: web.Application) -> AsyncIterator[str]:
    runner = BoundedRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


servers = pytest.mark.parametrize("server", [asgi, node])


@servers
async def test_a_stream_is_believed_frame_by_frame_and_never_as_a_whole(server):
    """Somebody on the network may have put anything behind its head."""
    async with server(trust(OLD), []) as url, http_session(trust=trust(OLD)) as session:
        for read in (lambda reply: reply.json(), lambda reply: reply.text(), lambda reply: reply.read()):
            async with session.post(f"{url}/echo", data=b"{}") as reply:
                with pytest.raises(UnprovenReplyError, match="a stream, where a whole answer is expected"):
                    await read(reply)
    async with server(OPEN, []) as url, http_session() as session, session.post(f"{url}/echo", data=b"{}") as reply:
        assert await reply.read() == b"{}", "in an open cluster it is"


class Ahead(SystemClock):
    """Of a machine whose clock is ahead by 20 s."""

    def wall(self) -> float:
        return super().wall() + 20.0


@servers
async def test_a_client_whose_clock_is_behind_is_answered_at_once_by_a_server_that_has_just_started(
    server, monkeypatch
):
    """By both of our clients; without this they were refused for 20 s after each start of a server."""
    monkeypatch.setitem(globals(), "verifier", lambda holder: RequestVerifier(holder, Ahead(), None))
    hits: Hits = []
    pool = HttpPool(connect_timeout_s=5.0, max_connections=4, keepalive_s=5.0, headers={}, trust=trust(OLD))
    try:
        async with server(trust(OLD), hits) as url, http_session(trust=trust(OLD)) as session:
            for number in range(3):
                async with session.post(f"{url}/echo", data=b"%d" % number) as reply:
                    assert reply.status == 200
            for answer in await asyncio.gather(*(pool.call("POST", f"{url}/echo", b"x", 5.0) for _ in range(3))):
                assert answer.status == 200
                answer.end()
    finally:
        pool.close()
    assert sorted(hits) == [b"0", b"1", b"2", b"x", b"x", b"x"], "what was refused had no effect"


@servers
@pytest.mark.parametrize("body", [None, b"text", bytes(100_000)])
async def test_a_proved_request_is_answered_whatever_its_body(server, body):
    hits: Hits = []
    async with server(trust(OLD), hits) as url, http_session(trust=trust(OLD)) as session:
        for path in ("/echo", "/echo?a=b%20c&d=é"):
            async with session.request("POST" if body else "GET", url + path, data=body) as reply:
                assert (reply.status, await reply.content.read()) == (200, body or b"")
    assert len(hits) == 2


@servers
@pytest.mark.parametrize("kind", ["application/json", "application/msgpack"])
async def test_an_unproved_request_gets_401_that_says_why_and_reaches_nothing(server, kind):
    hits: Hits = []
    async with server(trust(OLD), hits) as url, http_session() as session:
        async with session.post(url + "/echo", data=b"x", headers={"Accept": kind}) as reply:
            coded = msgspec.json if kind.endswith("json") else msgspec.msgpack
            error = coded.decode(await reply.read())["error"]
            assert (reply.status, error["code"]) == (401, "proof_refused")
            assert "security.secret" in error["message"]
        async with session.get(url + "/health") as reply:
            assert reply.status == 200
    assert hits == [b""]


@servers
async def test_a_proof_for_another_body_is_refused(server):
    hits: Hits = []
    sent: dict[str, str] = {}

    async def spy(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        sent.update(request.headers)
        raise aiohttp.ClientError("never sent")

    async with server(trust(OLD), hits) as url:
        async with http_session(trust=trust(OLD)) as session:
            session._middlewares = (*session._middlewares, spy)
            with pytest.raises(aiohttp.ClientError, match="never sent"):
                await session.post(url + "/echo", data=b"good")
        async with http_session() as session:
            for body, status in ((b"evil", 401), (b"good", 401)):
                async with session.post(url + "/echo", data=body, headers=sent) as reply:
                    assert reply.status == status
            assert hits == []


@servers
async def test_a_request_sent_again_by_another_is_refused(server):
    hits: Hits = []
    sent: list[dict[str, str]] = []

    async def spy(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        sent.append(dict(request.headers))
        return await send(request)

    async with server(trust(OLD), hits) as url:
        async with http_session(trust=trust(OLD)) as session:
            session._middlewares = (*session._middlewares, spy)
            assert (await session.post(url + "/echo", data=b"good")).status == 200
        async with http_session() as session, session.post(url + "/echo", data=b"good", headers=sent[0]) as reply:
            assert reply.status == 401
            assert "came before" in await reply.text()
    assert hits == [b"good"]


@servers
@pytest.mark.parametrize("holder", [OPEN, trust(NEW)])
async def test_a_server_without_our_secret_is_no_server_of_ours(server, holder):
    hits: Hits = []
    async with server(holder, hits) as url, http_session(trust=trust(OLD)) as session:
        known = "does not know" if holder is OPEN else f"answered 401 .* proved by secret {of(OLD)}.* knows {of(NEW)}"
        with pytest.raises(UnprovenReplyError, match=known):
            await session.post(url + "/echo", data=b"x")
        assert hits == [b"x"] * (holder is OPEN)


async def test_a_body_without_end_behind_a_proved_head_is_given_up_at_a_bound(monkeypatch):
    monkeypatch.setattr(http_client, "MAX_PROVEN_BYTES", 1 << 20)
    checks = verifier(trust(OLD))

    async def middle(request: web.Request) -> web.StreamResponse:
        proof = checks.check(request.method, request.raw_path, request.headers)
        response = web.StreamResponse(headers=dict(checks.reply_headers(proof, 200, b"ok")))
        await response.prepare(request)
        with suppress(ConnectionError):
            while True:
                await response.write(bytes(1 << 16))
        return response

    app = web.Application()
    app.router.add_get("/", middle)
    async with plain(app) as url, http_session(trust=trust(OLD)) as session, asyncio.timeout(60):
        with pytest.raises(UnprovenReplyError, match="more than 1048576 bytes"):
            await session.get(url)


@pytest.mark.parametrize("status", [200, 400, 401, 404, 503])
async def test_a_refusal_that_is_not_proved_says_nothing_but_that_nobody_of_ours_answered(status):
    """A man in the middle could have made it up, and with it what a client does next."""
    body = msgspec.json.encode({"error": {"code": "not_leader", "message": "ask him", "leader": "http://10.6.6.6:1"}})

    async def middle(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    app = web.Application()
    app.router.add_post("/v1/match", middle)
    async with plain(app) as url:
        transport = HttpMetadataTransport(url, trust=trust(OLD))
        with pytest.raises(MetadataUnavailableError, match="secret") as raised:
            await transport.call("/v1/match", b"x", 5.0)
        assert type(raised.value) is (MetadataProofError if status == 401 else MetadataUnavailableError)
        await transport.aclose()
        node = HttpNodeClient(connect_timeout_s=2.0, max_connections=1, trust=trust(OLD))
        with pytest.raises(NodeUnavailableError, match=f"answered {status}|secret"):
            await node.abort(url, "r1", timeout_s=5.0)
        await node.aclose()


@servers
async def test_refusals_of_the_cluster_are_proved_and_what_is_open_is_too_for_who_asks_with_a_proof(server):
    async with server(trust(OLD), []) as url, http_session(trust=trust(OLD)) as session:
        for method, path, status in (("GET", "/none", 404), ("DELETE", "/echo", 405), ("GET", "/health", 200)):
            async with session.request(method, url + path) as reply:
                assert reply.status == status


@servers
async def test_a_secret_is_changed_under_load_and_no_request_is_lost(server):
    """Both sides read the new one at different times, and in either order."""
    now: dict[str, tuple[bytes, ...]] = {"client": (OLD,), "server": (OLD,)}

    def reread(side: str) -> Any:
        return lambda: now[side]

    holders = {
        side: ClusterTrust("here", Secrets((OLD,), reread=reread(side), clock=SystemClock(), look_s=0.0))
        for side in now
    }
    hits: Hits = []
    sent = 0
    async with server(holders["server"], hits) as url, http_session(trust=holders["client"]) as session:
        steps = [("client", (NEW, OLD)), ("server", (NEW, OLD)), ("server", (NEW,)), ("client", (NEW,))]
        again = [("server", (OLD, NEW)), ("client", (OLD, NEW)), ("client", (OLD,)), ("server", (OLD,))]
        for side, secrets in [*steps, *again]:
            now[side] = secrets

            async def one() -> int:
                async with session.post(url + "/echo", data=b"x") as reply:
                    return reply.status

            statuses = await asyncio.gather(*(one() for _ in range(20)))
            sent += 20
            assert set(statuses) == {200}, (side, secrets)
    assert len(hits) == sent


async def test_a_proved_request_is_answered_with_a_proof_also_where_none_is_needed():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    server = AsgiServer(ProvenApp(app, verifier(trust(OLD)), lambda scope: False), "127.0.0.1", 0)
    await server.start()
    try:
        for holder in (OPEN, trust(OLD)):
            async with http_session(trust=holder) as session, session.get(server.url) as reply:
                assert reply.status == 200
        async with http_session(trust=trust(NEW)) as session:
            with pytest.raises(UnprovenReplyError, match="answered 401"):
                await session.get(server.url)
    finally:
        await server.aclose()


def test_what_a_server_is_called():
    assert authorities_of("10.0.0.1", 80) == {"10.0.0.1:80", "10.0.0.1"}
    assert authorities_of("Gpu-0", 8100) == {"gpu-0:8100"}
    assert authorities_of("127.0.0.1", 1) == {"127.0.0.1:1", "localhost:1", "[::1]:1"}
    assert authorities_of("0.0.0.0", 1) is None
    assert [is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "0.0.0.0", "10.0.0.1")] == [
        True, True, True, True, False, False,
    ]  # fmt: skip
