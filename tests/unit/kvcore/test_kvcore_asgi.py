import asyncio
import logging
import os
import socket
from pathlib import Path

import aiohttp
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from kvcore.errors import ConfigError
from kvcore.ports import listen, port_holder, why_unreachable
from kvcore.process.asgi import AsgiServer
from kvcore.process.limits import HttpLimits


def make_app(**gates: asyncio.Event) -> FastAPI:
    app = FastAPI()

    @app.get("/quick")
    async def quick() -> dict[str, str]:
        return {"say": "hi"}

    @app.get("/gated")
    async def gated() -> dict[str, str]:
        gates["entered"].set()
        await gates["gate"].wait()
        return {"say": "late"}

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def body():
            try:
                yield b"first"
                await asyncio.Event().wait()
            finally:
                gates["closed"].set()

        return StreamingResponse(body())

    return app


def test_a_port_in_use_names_address_and_holder():
    with listen("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} is in use by pid {os.getpid()} \(.+\); stop it"):
            listen("127.0.0.1", port)
    assert port_holder(port) is None


def test_the_holder_of_a_port_may_end_while_it_is_looked_for(monkeypatch):
    with listen("127.0.0.1", 0) as bound:
        read_bytes = Path.read_bytes

        def gone(path: Path) -> bytes:
            if path.name == "cmdline":
                raise ProcessLookupError(3, "No such process")
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", gone)
        with pytest.raises(ConfigError, match="is in use by another process"):
            listen("127.0.0.1", bound.getsockname()[1])


def test_an_address_of_another_machine_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:0: no interface"):
        listen("192.0.2.1", 0)


async def test_a_port_in_use_fails_the_start_and_leaves_nothing():
    with listen("127.0.0.1", 0) as held:
        server = AsgiServer(make_app(), "127.0.0.1", held.getsockname()[1])
        with pytest.raises(ConfigError, match="is in use"):
            await server.start()
        await server.aclose()


async def test_an_app_that_fails_to_start_fails_start():
    async def app(scope, receive, send):
        assert scope["type"] == "lifespan"
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no disk"})

    server = AsgiServer(app, "127.0.0.1", 0)
    with pytest.raises(RuntimeError):
        await server.start()
    listen("127.0.0.1", server.port).close()


async def test_serves_and_frees_its_port():
    server = AsgiServer(make_app(), "127.0.0.1", 0)
    await server.start()
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/quick") as reply:
        assert await reply.json() == {"say": "hi"}
        await server.drain(5.0)  # the kept-alive connection does not hold it up
    listen("127.0.0.1", server.port).close()
    await server.aclose()


async def test_a_drain_lets_a_request_under_way_end_and_refuses_new_ones():
    gate, entered = asyncio.Event(), asyncio.Event()
    server = AsgiServer(make_app(gate=gate, entered=entered), "127.0.0.1", 0)
    await server.start()
    async with aiohttp.ClientSession() as session:
        request = asyncio.create_task(session.get(f"{server.url}/gated"))
        await entered.wait()
        drain = asyncio.create_task(server.drain(100.0))
        async with asyncio.timeout(60):
            while True:
                try:
                    socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
                except ConnectionRefusedError:
                    break
                await asyncio.sleep(0)
        gate.set()
        async with await request as reply:
            assert await reply.json() == {"say": "late"}
        await drain


async def test_a_stream_that_outlives_the_deadline_is_cut():
    closed = asyncio.Event()
    server = AsgiServer(make_app(closed=closed), "127.0.0.1", 0)
    await server.start()
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/stream") as reply:
        assert await reply.content.readany() == b"first"
        await server.drain(0.05)
        with pytest.raises(aiohttp.ClientPayloadError):
            await reply.content.read()
    await asyncio.wait_for(closed.wait(), 60)


@pytest.mark.parametrize("ticks", range(12))
async def test_a_start_that_is_cancelled_ends_the_apps_lifespan_in_order(
    ticks: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    subject = AsgiServer(FastAPI(), "127.0.0.1", 0)
    starting = asyncio.create_task(subject.start())
    for _ in range(ticks):
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait({starting})
    await subject.aclose()
    assert asyncio.all_tasks() == before
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 18101)"), "Connection refused"),
        (OSError("Multiple exceptions: ..."), "Multiple exceptions: ..."),
        (socket.gaierror(-2, "Name or service not known"), "[Errno -2] Name or service not known"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_failed_connection_is_told_in_the_systems_words(error, text):
    assert why_unreachable(error) == text


async def test_a_server_says_where_it_is_and_whether_it_serves():
    server = AsgiServer(make_app(), "127.0.0.1", 0)
    assert repr(server) == "<AsgiServer 127.0.0.1:0, not started>"
    await server.start()
    assert repr(server) == f"<AsgiServer 127.0.0.1:{server.port}, serving>"
    await server.aclose()
    assert repr(server) == f"<AsgiServer 127.0.0.1:{server.port}, ended>"


async def test_a_server_whose_connections_are_idle_ends_without_waiting():
    server = AsgiServer(make_app(), "127.0.0.1", 0, limits=HttpLimits(look_s=3600))
    await server.start()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/quick") as response:
            assert response.status == 200
        async with asyncio.timeout(60):
            await server.drain(3600)
