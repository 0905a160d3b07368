"""A router of several processes: what one answers for all, how it leaves their port, and who is told it by name."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from support.router_fakes import Rig, make_rig, until

from kvcore.config.file import load_config
from kvcore.config.servers import other_urls, process_urls
from kvcore.errors import ConfigError
from kvcore.process.asgi import AsgiServer
from kvcore.trust.opening import OPEN
from router.__main__ import main
from router.listeners import ClosingApp
from router.processes.siblings import Sibling, Siblings, siblings_session
from router.processes.view import RouterView
from router.tenants.paths import is_operators_path
from router.tenants.sides import ClientsSide

SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"
PROMPT = list(range(40))


def shown(_tenant: str) -> bool:
    return True


class Two:
    """Two routers, of which the first asks the second by `view`."""

    def __init__(self, first: Rig, second: Rig, view: RouterView) -> None:
        self.first, self.second, self.view = first, second, view

    async def answer(self, rig: Rig, name: str) -> str:
        """The id of an answer."""
        transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://r") as http:
            body = {"model": "fake-model", "prompt": PROMPT, "max_tokens": 4}
            reply = await http.post("/v1/completions", json=body, headers={"X-Request-Id": name})
        return str(reply.json()["id"])


@asynccontextmanager
async def two(*, away: bool = False) -> AsyncIterator[Two]:
    first, second = await make_rig(), await make_rig()
    async with AsyncExitStack() as stack:
        server = AsgiServer(second.app, "127.0.0.1", 0)
        await server.start()
        stack.push_async_callback(server.aclose)
        session = await stack.enter_async_context(siblings_session(OPEN))
        url = "http://127.0.0.1:9" if away else server.url
        siblings = Siblings([Sibling("router.2", url)], session)
        view = RouterView(first.view._status, first.log, first.metrics, siblings, name="router.1")
        yield Two(first, second, view)


async def test_a_request_is_found_wherever_it_was_answered() -> None:
    async with two() as both:
        other = await both.answer(both.second, "same-name")
        for name in (other, "same-name"):
            found = await both.view.find(name, shown)
            assert found is not None and found.id == other and found.route is not None and found.route.candidates
        assert await both.view.find("nobody's", shown) is None
        assert await both.view.find(other, lambda tenant: tenant == "t") is None
        both.second.log.newest()[0].began_at = 5.0
        mine = await both.answer(both.first, "same-name")
        assert [record.id for record in await both.view.newest(shown)] == [other, mine]
        assert not await both.view.newest(lambda tenant: tenant == "t")
        both.first.log.newest()[0].began_at = 6.0
        for name, newest in ((mine, mine), (other, other), ("same-name", mine)):
            found = await both.view.find(name, shown)
            assert found is not None and found.id == newest


async def test_counts_are_of_all_processes_and_series_say_of_which() -> None:
    async with two() as both:
        for number, rig in enumerate([both.first, both.second, both.second]):
            await both.answer(rig, f"r{number}")
        status = await both.view.cluster()
        assert (status.requests.total, status.requests.ok) == (3, 3)
        assert [(one.name, one.problem) for one in status.processes] == [("router.1", None), ("router.2", None)]
        assert (await both.view.cache_stats()).start.requests == 3
        lines = (await both.view.metrics()).decode().splitlines()
        for name, count in (("router.1", 1), ("router.2", 2)):
            assert f'kvferry_router_request_seconds_count{{process="{name}"}} {count}.0' in lines
        assert len([line for line in lines if line.startswith("# TYPE kvferry_router_request_seconds ")]) == 1


async def test_a_process_that_is_away_is_left_out_and_named() -> None:
    async with two(away=True) as both:
        mine = await both.answer(both.first, "r")
        status = await both.view.cluster()
        assert status.requests.total == 1
        assert [one.problem for one in status.processes] == [None, "Connection refused"]
        assert [record.id for record in await both.view.newest(shown)] == [mine]
        assert b'process="router.2"' not in await both.view.metrics()


@pytest.mark.parametrize("body", ["nothing", '{"requests": 1}'])
async def test_what_another_version_answers_is_no_error_of_ours(body: str) -> None:
    async def odd(_: Request) -> PlainTextResponse:
        return PlainTextResponse(body)

    rig = await make_rig()
    server = AsgiServer(Starlette(routes=[Route("/{path:path}", odd)]), "127.0.0.1", 0)
    await server.start()
    async with siblings_session(OPEN) as session:
        view = RouterView(rig.view._status, rig.log, rig.metrics, Siblings([Sibling("b", server.url)], session))
        problem = (await view.cluster()).processes[-1].problem
        assert problem is not None and "does not understand" in problem
        assert await view.newest(shown) == [] and await view.find("x", shown) is None
        assert b"kvferry_router_active" in await view.metrics()
    await server.aclose()


async def said(session: aiohttp.ClientSession, url: str) -> tuple[str, str | None]:
    async with session.get(url) as reply:
        return (await reply.json())["by"], reply.headers.get("Connection")


async def test_a_process_that_leaves_answers_who_is_connected_and_the_other_gets_who_comes() -> None:
    def app(name: str) -> ClosingApp:
        async def by(_: Request) -> JSONResponse:
            return JSONResponse({"by": name}, headers={"connection": "keep-alive"})

        return ClosingApp(Starlette(routes=[Route("/", by)]))

    apps = [app("a"), app("b")]
    a = AsgiServer(apps[0], "127.0.0.1", 0, shared=True)
    await a.start()
    b = AsgiServer(apps[1], "127.0.0.1", a.port, shared=True)
    await b.start()
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(aiohttp.ClientSession()) for _ in range(24)]
        first = [await said(session, a.url) for session in sessions]
        assert {name for name, _ in first} == {"a", "b"}
        a.leave()
        a.leave()
        apps[0].closes = True
        kept = [await said(session, a.url) for session in sessions]
        assert [name for name, _ in kept] == [name for name, _ in first], "nobody's connection was cut"
        assert {connection for name, connection in kept if name == "a"} == {"close"}
        again = [await said(session, a.url) for session in sessions]
        assert {name for name, _ in again} == {"b"}
        await until(lambda: a.num_connections == 0)
    await a.aclose()
    await b.aclose()


async def test_what_the_kernel_has_accepted_for_a_process_that_leaves_is_answered() -> None:
    async def ok(_: Request) -> JSONResponse:
        return JSONResponse({})

    server = AsgiServer(Starlette(routes=[Route("/", ok)]), "127.0.0.1", 0, shared=True)
    await server.start()
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", server.port)) as waiting:  # the loop has not seen it
        server.leave()
        waiting.setblocking(False)
        await loop.sock_sendall(waiting, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await asyncio.wait_for(loop.sock_recv(waiting, 100), 10)).startswith(b"HTTP/1.1 200")
    await server.aclose()


def test_each_process_has_a_port_of_its_own() -> None:
    many = ["router.port=8000", "router.processes=3", "routers=['192.0.2.1:8000']", "security.open=true"]
    config = load_config(SIM, [*many, "router.process_port=9000"])
    assert process_urls(config) == [f"http://127.0.0.1:{port}" for port in (9000, 9001, 9002)]
    others = [f"http://192.0.2.1:{port}" for port in (9000, 9001, 9002)]
    assert other_urls(config, 2) == ["http://127.0.0.1:9000", "http://127.0.0.1:9002", *others]
    assert process_urls(load_config(SIM, ["router.port=8000", "router.processes=2"]))[0] == "http://127.0.0.1:8001"
    alone = load_config(SIM, ["routers=['192.0.2.1:8000']", "security.open=true"])
    assert not process_urls(alone) and other_urls(alone, 1) == ["http://192.0.2.1:8000"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("router.port=0", "router.port: 0 is any free one, and router.processes share one"),
        ("router.process_port=65535", "router.process_port: the last of 2 processes would have port 65536"),
        ("router.process_port=8699", "metadata_server.port: 8700 on 127.0.0.1 is router.processes[1] already"),
        ("routers=['127.0.0.1:8001']", "routers[0]: 8001 on 127.0.0.1 is router.processes[0] already"),
    ],
)
def test_processes_that_cannot_be_reached_are_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(SIM, ["router.port=8000", "metadata_server.port=8700", "router.processes=2", override])
    assert says in raised.value.message


def test_a_process_is_told_which_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", str(SIM), "--set", "router.processes=2"]
    for more, why in (([], "--process NUMBER: missing; the router has processes 1 to 2"), (["--process", "3"], "is 2")):
        assert main([*given, *more]) == 2
        assert why in capsys.readouterr().err


def test_what_one_process_says_is_for_operators() -> None:
    assert is_operators_path("GET", "/v1/process/requests")
    sent: list[Any] = []

    async def ask() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        async def app(*_: Any) -> None:
            raise AssertionError("it was let through")

        scope = {"type": "http", "method": "GET", "path": "/v1/process", "headers": []}
        await ClientsSide(app, has_keys=True)(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(ask())
    assert sent[0]["status"] == 404
