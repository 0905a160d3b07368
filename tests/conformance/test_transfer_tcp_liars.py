"""The TCP transport against peers that lie, stall or break off: raw sockets on either side."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ports import free_ports

from kvcore.errors import (
    PeerUnreachableError,
    SegmentUnknownError,
    TransferError,
    TransferProtocolError,
    TransferTimeoutError,
)
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.tcp import wire
from transfer.tcp.host import TcpSegmentHost
from transfer.tcp.limits import TcpLimits
from transfer.tcp.sockets import split_address
from transfer.tcp.transport import TcpTransfer

SIZE = 1 << 16
ID = "liars.1"
MARK = b"\x5a"


@contextlib.asynccontextmanager
async def hosted(**limits: float) -> AsyncIterator[tuple[TcpSegmentHost, bytearray]]:
    memory = bytearray(MARK * SIZE)
    host = TcpSegmentHost(ID, memoryview(memory), "127.0.0.1", limits=TcpLimits(**limits))  # type: ignore[arg-type]
    await host.start()
    try:
        yield host, memory
    finally:
        await host.aclose()


def connect(host: TcpSegmentHost, *, greet: bool = True) -> socket.socket:
    sock = socket.create_connection(split_address(host.address), timeout=5)
    if greet:
        sock.sendall(wire.pack_hello(ID))
        welcome = wire.pack_welcome(ID, SIZE)
        assert sock.recv(len(welcome), socket.MSG_WAITALL) == welcome
    return sock


def answer_to(host: TcpSegmentHost, raw: bytes, *, greet: bool = True) -> bytes:
    """All that the host says to `raw` until it closes the connection; b"" also for a reset."""
    with connect(host, greet=greet) as sock, contextlib.suppress(OSError):
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        said = b""
        while part := sock.recv(1 << 16):
            said += part
        return said
    return b""


def error_in(said: bytes) -> TransferError:
    header = wire.parse_header(said[: wire.HEADER_BYTES])
    assert header.kind is wire.FrameKind.ERROR
    return wire.parse_error(header, said[wire.HEADER_BYTES :])


def request(kind: wire.FrameKind, *ranges: tuple[int, int]) -> bytes:
    return wire.pack_request(kind, ranges, 1)


def forged(header: wire.Header, table: bytes = b"") -> bytes:
    return wire.pack_header(header) + table


RANGE = (16).to_bytes(8, "little") + (32).to_bytes(8, "little")

LIES = {
    "another version": (b"KVFT\x02\x00" + wire.pack_hello(ID)[6:], TransferProtocolError),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n......", TransferProtocolError),
    "a reply": (forged(wire.Header(wire.FrameKind.DATA, 1)), TransferProtocolError),
    "no ranges": (forged(wire.Header(wire.FrameKind.WRITE, 0)), TransferProtocolError),
    "too many ranges": (forged(wire.Header(wire.FrameKind.WRITE, wire.MAX_OPS + 1)), TransferProtocolError),
    "wrong table checksum": (forged(wire.Header(wire.FrameKind.WRITE, 1, 7, 32), RANGE), TransferProtocolError),
    "payload is not the sum": (
        forged(wire.Header(wire.FrameKind.WRITE, 1, crc32(RANGE), 33), RANGE),
        TransferProtocolError,
    ),
    "past the end": (request(wire.FrameKind.WRITE, (0, 16), (SIZE - 8, 9)), SegmentUnknownError),
    "wraps around": (request(wire.FrameKind.WRITE, ((1 << 64) - 8, 16)), SegmentUnknownError),
    "reads past the end": (request(wire.FrameKind.READ, (SIZE, 1)), SegmentUnknownError),
}


@pytest.mark.parametrize("name", LIES)
async def test_a_lying_client_is_told_and_disconnected_and_nothing_is_written(name: str) -> None:
    raw, expected = LIES[name]
    async with hosted() as (host, memory):
        said = await asyncio.to_thread(answer_to, host, raw)
        assert type(error_in(said)) is expected
        assert memory == MARK * SIZE


async def test_hello_for_another_segment_is_refused() -> None:
    async with hosted() as (host, _):
        said = await asyncio.to_thread(answer_to, host, wire.pack_hello("liars.0"), greet=False)
        assert isinstance(error_in(said), SegmentUnknownError)


async def test_a_machine_out_of_threads_refuses_and_serves_again_when_it_has_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with hosted() as (host, _):
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name != "kvferry-tcp-serve":
                return start(thread)
            monkeypatch.setattr(threading.Thread, "start", start)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert await asyncio.to_thread(answer_to, host, wire.pack_hello(ID), greet=False) == b""
        assert host.num_connections == 0
        said = await asyncio.to_thread(answer_to, host, wire.pack_hello(ID), greet=False)
        assert said == wire.pack_welcome(ID, SIZE)


async def test_request_before_hello_is_refused() -> None:
    async with hosted() as (host, memory):
        raw = request(wire.FrameKind.WRITE, (0, 4)) + b"evil"
        said = await asyncio.to_thread(answer_to, host, raw, greet=False)
        assert said == b"" or isinstance(error_in(said), TransferProtocolError)
        assert memory == MARK * SIZE


async def test_truncated_write_is_never_acknowledged() -> None:
    async with hosted() as (host, memory):
        raw = request(wire.FrameKind.WRITE, (0, 100)) + b"x" * 99
        assert await asyncio.to_thread(answer_to, host, raw) == b""
        assert memory[99:] == MARK * (SIZE - 99)


async def test_any_flipped_header_or_table_bit_is_refused_before_a_byte_is_written() -> None:
    good = request(wire.FrameKind.WRITE, (16, 32))

    async with hosted() as (host, memory):

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(bit=st.integers(0, 8 * len(good) - 1))
        def check(bit: int) -> None:
            raw = bytearray(good)
            raw[bit // 8] ^= 1 << bit % 8
            said = answer_to(host, bytes(raw) + b"x" * 32)
            assert said == b"" or isinstance(error_in(said), TransferError)
            assert memory == MARK * SIZE

        await asyncio.to_thread(check)


@given(raw=st.binary(min_size=32, max_size=32))
def test_random_headers_are_refused(raw: bytes) -> None:
    with pytest.raises(TransferProtocolError):
        wire.parse_header(raw)


async def test_half_open_and_silent_clients_are_dropped_in_time() -> None:
    async with hosted(message_timeout_s=0.5, idle_timeout_s=0.5) as (host, _):

        def wait_for_end(raw: bytes, greet: bool) -> bytes:
            with connect(host, greet=greet) as sock, contextlib.suppress(ConnectionError):
                sock.sendall(raw)
                return sock.recv(100)
            return b""  # what came too late for the host resets the connection

        ways = ((b"", False), (b"KVFT", False), (b"", True), (b"KVFT", True))
        assert await asyncio.gather(*(asyncio.to_thread(wait_for_end, *way) for way in ways)) == [b""] * 4


async def test_connections_over_the_bound_are_closed_and_the_others_live() -> None:
    async with hosted(max_connections=1) as (host, _):

        def second_is_closed() -> None:
            with connect(host) as first, connect(host, greet=False) as second:
                assert second.recv(1) == b""
                first.sendall(request(wire.FrameKind.READ, (0, 4)))
                assert first.recv(36, socket.MSG_WAITALL)[32:] == MARK * 4

        await asyncio.to_thread(second_is_closed)


Script = Callable[[socket.socket], None]


@contextlib.contextmanager
def lying_server(script: Script) -> Iterator[Segment]:
    """A server that runs `script` on its first connection and then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as sock:
                sock.settimeout(5)
                script(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Segment(id=ID, node_id="liars", size_bytes=SIZE, host_id="h", addresses={"tcp": f"127.0.0.1:{port}"})
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def after_hello(reply: bytes) -> Script:
    def script(sock: socket.socket) -> None:
        sock.recv(len(wire.pack_hello(ID)), socket.MSG_WAITALL)
        sock.sendall(wire.pack_welcome(ID, SIZE))
        sock.recv(wire.HEADER_BYTES + wire.ENTRY_BYTES, socket.MSG_WAITALL)
        sock.sendall(reply)

    return script


def wait_for_end(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def data(count: int, payload: int, request_id: int) -> bytes:
    return wire.pack_header(wire.Header(wire.FrameKind.DATA, count, 0, payload, request_id))


SERVER_LIES: dict[str, tuple[Script, type[TransferError]]] = {
    "closes at once": (lambda sock: None, PeerUnreachableError),
    "speaks another protocol": (
        lambda sock: sock.sendall(b"HTTP/1.1 400 Bad\r\nxxxxxxxxxxxxxxxxxxxx"),
        TransferProtocolError,
    ),
    "welcomes to another segment": (lambda sock: sock.sendall(wire.pack_welcome("x.1", SIZE)), SegmentUnknownError),
    "welcomes to another size": (lambda sock: sock.sendall(wire.pack_welcome(ID, SIZE + 1)), SegmentUnknownError),
    "endless welcome": (
        lambda sock: sock.sendall(wire.pack_header(wire.Header(wire.FrameKind.WELCOME, payload_bytes=1 << 40))),
        TransferProtocolError,
    ),
    "more bytes than asked for": (after_hello(data(1, 33, 1) + b"x" * 33), TransferProtocolError),
    "another request's answer": (after_hello(data(1, 32, 2) + b"x" * 32), TransferProtocolError),
    "acknowledges a read": (
        after_hello(wire.pack_header(wire.Header(wire.FrameKind.WRITTEN, 1, request_id=1))),
        TransferProtocolError,
    ),
    "breaks off in the data": (after_hello(data(1, 32, 1) + b"x" * 31), PeerUnreachableError),
    "flipped header byte": (after_hello(data(1, 32, 1)[:-1] + b"\0" + b"x" * 32), TransferProtocolError),
    "never says a word": (wait_for_end, TransferTimeoutError),
}


@pytest.mark.parametrize("name", SERVER_LIES)
async def test_a_lying_server_gives_an_error_and_its_connection_is_not_used_again(name: str) -> None:
    script, expected = SERVER_LIES[name]
    transfer = TcpTransfer()
    with lying_server(script) as segment:
        op = TransferOp(segment, 16, [memoryview(bytearray(32))])
        (error,) = await transfer.read([op], 0.2 if expected is TransferTimeoutError else 5)
        assert type(error) is expected, error
        await transfer.aclose()


async def test_a_stalled_write_ends_at_its_deadline_and_on_cancellation() -> None:
    transfer = TcpTransfer()
    stalled, release = threading.Event(), threading.Event()

    def stall(sock: socket.socket) -> None:
        sock.recv(len(wire.pack_hello(ID)), socket.MSG_WAITALL)
        sock.sendall(wire.pack_welcome(ID, SIZE))
        stalled.set()
        release.wait(5)

    big = memoryview(bytearray(SIZE))
    for deadline_s in (0.1, 10.0):
        stalled.clear()
        with lying_server(stall) as segment:
            task = asyncio.create_task(transfer.write([TransferOp(segment, 0, [big])], deadline_s))
            await asyncio.to_thread(stalled.wait, 5)
            if deadline_s > 1:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                assert isinstance((await task)[0], TransferTimeoutError)
            release.set()
        release.clear()
    await transfer.aclose()


async def test_nobody_listening_is_unreachable_and_bad_addresses_too() -> None:
    transfer = TcpTransfer()
    (port,) = free_ports(1)
    for address in (f"127.0.0.1:{port}", "nonsense", "127.0.0.1:99999999"):
        segment = Segment(id=ID, node_id="l", size_bytes=SIZE, host_id="h", addresses={"tcp": address})
        (error,) = await transfer.read([TransferOp(segment, 0, [memoryview(bytearray(4))])], 2)
        assert isinstance(error, PeerUnreachableError), address
    await transfer.aclose()


async def test_what_a_late_write_had_not_sent_yet_never_arrives():
    """The room may be another's when the peer reads on: the connection is reset, with all that the kernel still has."""
    listener = socket.create_server(("127.0.0.1", 0))
    size = 64 << 20  # more than the buffers of both ends hold
    where = {"tcp": f"127.0.0.1:{listener.getsockname()[1]}"}
    segment = Segment(id=ID, node_id="liars", size_bytes=size, host_id="h", addresses=where)
    transfer = TcpTransfer()
    op = TransferOp(segment, 0, [memoryview(bytes(size))])
    writing = asyncio.create_task(transfer.write([op], 0.5))
    peer, _ = await asyncio.to_thread(listener.accept)
    with listener, peer:
        peer.settimeout(5)
        peer.sendall(wire.pack_welcome(ID, size))
        assert isinstance((await writing)[0], TransferTimeoutError)
        got = 0

        def read_on() -> None:
            nonlocal got
            while part := peer.recv(1 << 20):
                got += len(part)

        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(read_on)
        assert got < size
    await transfer.aclose()
