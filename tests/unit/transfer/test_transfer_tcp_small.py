"""Small batches over TCP run on the event loop: they fail, end and mix with large ones as those in threads do."""

import asyncio
import contextlib
import fcntl
import itertools
import os
import socket
import termios
import threading
from collections.abc import Callable, Iterator

import pytest
from support.slow import slow_but
from support.transfer_rigs import SIZE_BYTES, Rig, resources

from kvcore.errors import (
    PeerUnreachableError,
    SegmentUnknownError,
    TransferError,
    TransferProtocolError,
    TransferTimeoutError,
)
from kvcore.process.service import loop_factory
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.tcp import wire
from transfer.tcp.limits import TcpLimits
from transfer.tcp.sockets import tune
from transfer.tcp.transport import TcpTransfer

SIZE = 1 << 20
ID = "small.1"


@contextlib.contextmanager
def server(second: Callable[[socket.socket], None]) -> Iterator[Segment]:
    """Serves a first READ of 16 bytes in order, and leaves the second request to `second`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as sock:
                sock.settimeout(5)
                sock.recv(len(wire.pack_hello(ID)), socket.MSG_WAITALL)
                sock.sendall(wire.pack_welcome(ID, SIZE))
                sock.recv(wire.HEADER_BYTES + wire.ENTRY_BYTES, socket.MSG_WAITALL)
                sock.sendall(data(16, 1) + bytes(16))
                second(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield Segment(id=ID, node_id="n", size_bytes=SIZE, host_id="h", addresses={"tcp": address})
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def data(payload: int, request_id: int) -> bytes:
    return wire.pack_header(wire.Header(wire.FrameKind.DATA, 1, 0, payload, request_id))


def answers(reply: bytes) -> Callable[[socket.socket], None]:
    def second(sock: socket.socket) -> None:
        sock.recv(wire.HEADER_BYTES + wire.ENTRY_BYTES, socket.MSG_WAITALL)
        sock.sendall(reply)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)

    return second


def silent(sock: socket.socket) -> None:
    while sock.recv(1 << 16):
        pass


def read(segment: Segment, size: int) -> TransferOp:
    return TransferOp(segment, 0, [memoryview(bytearray(size))])


LIES: dict[str, tuple[Callable[[socket.socket], None], type[TransferError]]] = {
    "says nothing": (silent, TransferTimeoutError),
    "closes": (answers(b""), PeerUnreachableError),
    "breaks off in the header": (answers(data(100_000, 2)[:20]), PeerUnreachableError),
    "breaks off in the data": (answers(data(100_000, 2) + bytes(99_999)), PeerUnreachableError),
    "more than asked for": (answers(data(100_001, 2)), TransferProtocolError),
    "another request's answer": (answers(data(100_000, 1) + bytes(100_000)), TransferProtocolError),
    "an error": (answers(wire.pack_error(SegmentUnknownError("moved away"))), SegmentUnknownError),
    "half an error": (answers(wire.pack_error(SegmentUnknownError("moved away"))[:-2]), PeerUnreachableError),
}


@pytest.mark.parametrize("name", slow_but(["says nothing", "breaks off in the data"], LIES))
async def test_a_lie_after_a_good_answer_is_an_error_and_its_connection_is_not_used_again(name: str) -> None:
    second, expected = LIES[name]
    before = resources()
    transfer = TcpTransfer()
    with server(second) as segment:
        assert await transfer.read([read(segment, 16)], 5) == [None]
        (error,) = await transfer.read([read(segment, 100_000)], 0.2 if expected is TransferTimeoutError else 5)
        assert type(error) is expected, error
        await transfer.aclose()
    assert resources() == before


async def test_a_peer_that_takes_nothing_is_late_and_not_waited_for_after_cancellation() -> None:
    stalled, release = threading.Event(), threading.Event()

    def stall(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        stalled.set()
        release.wait(5)

    for timeout_s in (0.1, 10.0):
        stalled.clear()
        release.clear()
        transfer = TcpTransfer()
        with server(stall) as segment:
            assert await transfer.read([read(segment, 16)], 5) == [None]
            await asyncio.to_thread(stalled.wait, 5)
            op = TransferOp(segment, 0, [memoryview(bytes(200_000))])
            task = asyncio.create_task(transfer.write([op], timeout_s))
            if timeout_s > 1:
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                assert isinstance((await task)[0], TransferTimeoutError)
            release.set()
            await transfer.aclose()


async def test_closing_ends_a_small_batch_under_way_before_it_returns() -> None:
    transfer = TcpTransfer()
    with server(silent) as segment:
        assert await transfer.read([read(segment, 16)], 5) == [None]
        task = asyncio.create_task(transfer.read([read(segment, 16)], 10))
        await asyncio.sleep(0)
        await transfer.aclose()
        (error,) = await asyncio.wait_for(task, 60)
        assert isinstance(error, PeerUnreachableError)
        assert isinstance((await transfer.read([read(segment, 16)], 5))[0], PeerUnreachableError)


async def mix() -> None:
    sizes = [1, 4096, 3 << 20, 100_000, 17, (1 << 20) + 5, 256 << 10, 64, 5 << 20, 4096]
    async with Rig("tcp") as rig:
        for number, size in enumerate(sizes * 2):
            sent, back = os.urandom(size), bytearray(size)
            shown: list[bytes] = []
            assert await rig.engine.write([rig.op(number, sent)], 10) == [None]
            op = TransferOp(rig.segment, number, [memoryview(back)], lambda part, to=shown: to.append(bytes(part)))
            assert await rig.engine.read([op], 10) == [None]
            assert back == sent == b"".join(shown)
        many = [rig.op(at, os.urandom(16)) for at in range(0, 5000 * 16, 16)]  # more ranges than a frame takes
        assert await rig.engine.write(many, 10) == [None] * 5000
        assert rig.memory.view[: 5000 * 16] == b"".join(bytes(op.buffers[0]) for op in many)


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, loop_factory()])
def test_small_and_large_batches_share_connections_on_either_event_loop(
    factory: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """libuv leaves a descriptor that it has watched non-blocking, which a thread must not meet."""
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(mix())


async def test_a_request_in_many_small_pieces_is_served_and_the_next_one_too() -> None:
    async with Rig("tcp") as rig:
        host, _, port = rig.segment.addresses["tcp"].rpartition(":")
        payload = os.urandom(100_000)

        def drip() -> bytes:
            with socket.create_connection((host, int(port)), timeout=5) as sock:
                sock.settimeout(None)  # else MSG_WAITALL waits for nothing
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(wire.pack_hello(rig.segment.id))
                sock.recv(len(wire.pack_welcome(rig.segment.id, SIZE_BYTES)), socket.MSG_WAITALL)
                write = wire.pack_request(wire.FrameKind.WRITE, [(0, 50_000), (60_000, 50_000)], 7) + payload
                cuts = [*range(0, 81, 3), 1000, 60_000, len(write)]
                for start, end in itertools.pairwise(cuts):
                    sock.sendall(write[start:end])
                assert wire.parse_header(sock.recv(32, socket.MSG_WAITALL)).kind is wire.FrameKind.WRITTEN
                sock.sendall(wire.pack_request(wire.FrameKind.READ, [(0, 50_000), (60_000, 50_000)], 8))
                return sock.recv(32 + len(payload), socket.MSG_WAITALL)[32:]

        assert await asyncio.to_thread(drip) == payload


async def test_an_answer_that_the_kernel_hands_over_in_parts_is_not_waited_for_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss on the way, or a small receive buffer, wakes the reader early. The rest is then less than it waits for."""

    def small_buffer(sock: socket.socket, limits: TcpLimits) -> None:
        tune(sock, limits)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)

    released = threading.Event()

    def answers_slowly(sock: socket.socket) -> None:
        sock.recv(wire.HEADER_BYTES + wire.ENTRY_BYTES, socket.MSG_WAITALL)
        reply = data(100_000, 2) + bytes(range(250)) * 400
        sock.sendall(reply[:-1000])
        while fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)) != bytes(4):
            released.wait(0.001)
        sock.sendall(reply[-1000:])
        released.wait(10)  # an open connection: its end would wake the reader

    monkeypatch.setattr("transfer.tcp.transport.tune", small_buffer)
    transfer = TcpTransfer()
    with server(answers_slowly) as segment:
        assert await transfer.read([read(segment, 16)], 5) == [None]
        op = read(segment, 100_000)
        assert await transfer.read([op], 2) == [None]
        released.set()
        assert bytes(op.buffers[0]) == bytes(range(250)) * 400
        await transfer.aclose()
