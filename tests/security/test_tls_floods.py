"""Connections that never end their TLS handshake: they count from the first on, one client has its share, all end."""

import asyncio
import logging
import ssl
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from support.certificates import cluster_certificates, process_tls
from support.hostile_http import Listener, aiohttp_listener, uvicorn_listener

from kvcore.process.limits import HttpLimits
from kvcore.trust.certificates import ProcessCertificate

GET = b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
Serving = Callable[[HttpLimits, ssl.SSLContext], AbstractAsyncContextManager[Listener]]
Loop = Callable[[], asyncio.AbstractEventLoop]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    def on_that_loop(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(test)

    return on_that_loop


@pytest.fixture(params=[uvicorn_listener, aiohttp_listener])
def serving(request: pytest.FixtureRequest) -> Serving:
    return request.param


@pytest.fixture
def certificate(tmp_path: Path) -> ProcessCertificate:
    cluster_certificates(tmp_path, ["one"])
    return ProcessCertificate(process_tls(tmp_path, "one"))


async def get(certificate: ProcessCertificate, port: int, path: bytes, source: str = "127.0.0.1") -> bytes:
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=certificate.client, local_addr=(source, 0)
        )
        try:
            writer.write(GET % path)
            return await reader.read()
        finally:
            writer.close()


def test_connections_without_a_handshake_count_as_any_other(
    serving: Serving, certificate: ProcessCertificate, run: Callable[..., None]
):
    async def flood() -> None:
        limits = HttpLimits(max_connections=16, max_per_client=4, max_spare=3, handshake_s=60, spare_head_s=60)
        async with serving(limits, certificate.server) as listener:
            assert b" 200 " in await get(certificate, listener.port, b"/")
            await listener.until(lambda: listener.gate.num_connections == 0)
            writers = [(await listener.connect())[1] for _ in range(20)]
            await listener.until(lambda: listener.gate.refused["client_connections"] == 16)
            assert listener.gate.num_connections == 4, "one client's share, and none of them has said a word"
            await listener.until(lambda: "3 spare" in repr(listener.gate))
            assert b" 200 " in await get(certificate, listener.port, b"/health"), "operators see what is the matter"
            assert b" 503 " in await get(certificate, listener.port, b"/")
            assert b" 200 " in await get(certificate, listener.port, b"/", "127.0.0.2"), "others are served"
            for writer in writers:
                writer.close()
            await listener.until(lambda: listener.gate.num_connections == 0)

    run(flood())


def test_a_handshake_that_does_not_end_is_cut(
    serving: Serving, certificate: ProcessCertificate, run: Callable[..., None]
):
    async def slow() -> None:
        async with serving(HttpLimits(handshake_s=0.1), certificate.server) as listener:
            reader, writer = await listener.connect()
            writer.write(b"\x16\x03\x01")  # of a first record
            async with asyncio.timeout(60):
                assert await reader.read() == b""
            writer.close()
            await listener.until(lambda: listener.gate.num_connections == 0)

    run(slow())


def test_a_fault_while_a_connection_is_taken_ends_that_one_alone(
    serving: Serving,
    certificate: ProcessCertificate,
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    async def faults() -> None:
        async with serving(HttpLimits(accept_again_s=0.01), certificate.server) as listener:
            limits = listener.gate.limits
            wrong = replace(limits, handshake_s="soon")
            for name, fault in (("admit", broken), ("limits", wrong)):
                with monkeypatch.context() as patched:
                    patched.setattr(listener.gate, name, fault)
                    reader, writer = await listener.connect()
                    async with asyncio.timeout(60):
                        assert await reader.read() == b""
                    writer.close()
                assert b" 200 " in await get(certificate, listener.port, b"/"), "the next one is served"
            await listener.until(lambda: listener.gate.num_connections == 0)

    with caplog.at_level(logging.ERROR):
        run(faults())
    assert "accept_failed" in caplog.text and "a fault of ours" in caplog.text
    assert "connection_failed" in caplog.text


def test_a_listener_that_ends_cuts_handshakes(
    serving: Serving, certificate: ProcessCertificate, run: Callable[..., None]
):
    async def ends() -> None:
        async with serving(HttpLimits(), certificate.server) as listener:
            reader, writer = await listener.connect()
            await listener.until(lambda: listener.gate.num_connections == 1)
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        writer.close()
        await listener.until(lambda: listener.gate.num_connections == 0)
        with pytest.raises(ConnectionRefusedError):
            await listener.connect()

    run(ends())
