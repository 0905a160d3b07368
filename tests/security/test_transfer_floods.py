"""Peers of the TCP transport that hold connections: bytes that drip in mid-frame, all connections at once, noise."""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from transfer.tcp import wire
from transfer.tcp.host import TcpSegmentHost
from transfer.tcp.limits import TcpLimits
from transfer.tcp.sockets import split_address

SIZE = 1 << 16
ID = "floods.1"


@contextlib.asynccontextmanager
async def hosted(limits: TcpLimits, size: int = SIZE) -> AsyncIterator[TcpSegmentHost]:
    host = TcpSegmentHost(ID, memoryview(bytearray(size)), "127.0.0.1", limits=limits)
    await host.start()
    try:
        yield host
    finally:
        await host.aclose()


def greeted(host: TcpSegmentHost, source: str = "127.0.0.1", size: int = SIZE) -> socket.socket | None:
    """A connection that the host serves; None: it is refused."""
    sock = socket.create_connection(split_address(host.address), timeout=5, source_address=(source, 0))
    welcome = wire.pack_welcome(ID, size)
    with contextlib.suppress(OSError):
        sock.sendall(wire.pack_hello(ID))
        if sock.recv(len(welcome), socket.MSG_WAITALL) == welcome:
            return sock
    sock.close()
    return None


def drip(sock: socket.socket, data: bytes, stopped: threading.Event) -> None:
    """A byte now and then, each soon enough for the time of a step."""
    with contextlib.suppress(OSError):
        for byte in data:
            if stopped.wait(0.02):
                return
            sock.sendall(bytes((byte,)))


async def test_a_payload_that_drips_is_cut_though_each_step_is_in_time():
    """It held a connection and its thread for as long as it liked: 256 of them, every one that there is."""
    async with hosted(TcpLimits(message_timeout_s=0.15, slowest_bytes_per_s=1 << 20)) as host:
        sock = await asyncio.to_thread(greeted, host)
        assert sock is not None
        sock.sendall(wire.pack_request(wire.FrameKind.WRITE, [(0, 4096)], 1))
        stopped = threading.Event()
        dripping = asyncio.create_task(asyncio.to_thread(drip, sock, bytes(4096), stopped))
        async with asyncio.timeout(60):
            while host.num_connections:  # noqa: ASYNC110 - it is another thread's
                await asyncio.sleep(0.01)
        stopped.set()
        await dripping
        sock.close()


@pytest.mark.slow
async def test_a_reader_that_takes_nothing_of_what_it_asked_for_is_cut():
    """It held a connection and its thread, as what drips did."""
    limits = TcpLimits(message_timeout_s=0.5, slowest_bytes_per_s=1 << 30)
    async with hosted(limits, 64 << 20) as host:
        sock = await asyncio.to_thread(greeted, host, size=64 << 20)
        assert sock is not None
        sock.sendall(wire.pack_request(wire.FrameKind.READ, [(0, 32 << 20), (32 << 20, 32 << 20)], 1))
        async with asyncio.timeout(60):
            while host.num_connections:  # noqa: ASYNC110 - it is another thread's
                await asyncio.sleep(0.01)
        sock.close()


async def test_one_address_cannot_take_all_connections():
    async with hosted(replace(TcpLimits(), max_connections=8, max_per_peer=4)) as host:
        held = [await asyncio.to_thread(greeted, host) for _ in range(8)]
        assert [sock is not None for sock in held] == [True] * 4 + [False] * 4
        other = await asyncio.to_thread(greeted, host, "127.0.0.2")
        assert other is not None
        held[0].close()  # type: ignore[union-attr]
        async with asyncio.timeout(60):
            while (again := await asyncio.to_thread(greeted, host)) is None:
                pass
        for sock in (*held[1:4], other, again):
            assert sock is not None
            sock.close()


async def test_noise_is_a_few_lines_of_the_log(caplog: pytest.LogCaptureFixture):
    def say_nonsense(host: TcpSegmentHost) -> None:
        with socket.create_connection(split_address(host.address), timeout=5) as sock, contextlib.suppress(OSError):
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
            while sock.recv(4096):
                pass

    async with hosted(TcpLimits()) as host:
        with caplog.at_level(logging.WARNING):
            for _ in range(30):
                await asyncio.to_thread(say_nonsense, host)
            async with asyncio.timeout(60):
                while host.num_connections:  # noqa: ASYNC110 - it is another thread's
                    await asyncio.sleep(0.01)
    assert sum("peer_broke_protocol" in line for line in caplog.messages) == 1
