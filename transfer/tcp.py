"""The initiator's side of the TCP transport: pooled connections, batches striped over them, blocking I/O in threads.

Owns the connections: one that saw any error, timeout or cancellation is closed, never reused. Bytes go straight between
the caller's buffers and the socket.
"""

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from kvcore.errors import (
    ConfigError,
    PeerUnreachableError,
    SegmentUnknownError,
    TransferError,
    TransferProtocolError,
    TransferTimeoutError,
)
from kvcore.types import Segment
from transfer import wire
from transfer.base import Direction, TransferOp
from transfer.blocking import BlockingPool, Deadline
from transfer.ranges import check_batch
from transfer.sockets import Budget, recv_bytes, recv_views, send_views, shut_down, split_address, tune
from transfer.stripes import Part, stripe

_STRIPE_BYTES = 8 << 20
"""A batch uses one connection for each so many bytes: less is not worth another thread."""
_CORES_A_STREAM = 2
"""On 2 cores, two streams over loopback were 15 to 25 % slower than one: each keeps a core busy on either side."""
_THREADS = 16


@dataclass(eq=False, slots=True)
class _Connection:
    sock: socket.socket
    greeted: bool = False
    request_ids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))


class _Peer:
    """Connections to one segment at one address."""

    def __init__(self, streams: int) -> None:
        self.free = asyncio.Semaphore(streams)
        self.idle: list[_Connection] = []
        self.users = 0

    def take_idle(self) -> _Connection | None:
        """An idle connection whose peer has not closed it meanwhile."""
        while self.idle:
            connection = self.idle.pop()
            if _usable(connection.sock):
                return connection
            connection.sock.close()
        return None


class TcpTransfer:
    """TransferEngine over TCP: at most `streams` connections a segment; a batch uses as many as pay for it."""

    kind = "tcp"

    def __init__(self, streams: int = 2) -> None:
        self._streams = streams
        self._stripes = max(1, min(streams, (os.cpu_count() or 1) // _CORES_A_STREAM))
        self._pool = BlockingPool("kvferry-tcp", _THREADS)
        self._peers: dict[tuple[str, str], _Peer] = {}

    def reaches(self, segment: Segment) -> bool:
        """Whether the segment has a `tcp` address."""
        return self.kind in segment.addresses

    def register(self, region: memoryview) -> None:
        """Nothing to do: sockets take any memory."""

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """As TransferEngine.aclose."""
        await self._pool.aclose()
        for peer in self._peers.values():
            while peer.idle:
                peer.idle.pop().sock.close()

    async def _transfer(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        results = check_batch(direction, ops)
        deadline = Deadline(timeout_s)
        groups: dict[tuple[str, str], list[tuple[int, TransferOp]]] = {}
        for index, op in enumerate(ops):
            if results[index] is None and op.num_bytes:
                groups.setdefault((op.segment.addresses.get(self.kind, ""), op.segment.id), []).append((index, op))
        jobs = [
            (group[0][1].segment, parts)
            for group in groups.values()
            for parts in stripe(group, self._stripes, _STRIPE_BYTES)
        ]

        async def run(segment: Segment, parts: list[Part]) -> None:
            error = await self._run_stripe(direction, segment, parts, deadline)
            for part in parts:
                results[part.op_index] = results[part.op_index] or error

        if len(jobs) == 1:  # no task: a small batch is all latency
            await run(*jobs[0])
        else:
            async with asyncio.TaskGroup() as tasks:
                for segment, parts in jobs:
                    tasks.create_task(run(segment, parts))
        return results

    async def _run_stripe(
        self, direction: Direction, segment: Segment, parts: list[Part], deadline: Deadline
    ) -> TransferError | None:
        key = (segment.addresses.get(self.kind, ""), segment.id)
        peer = self._peers.setdefault(key, _Peer(self._streams))
        peer.users += 1
        try:
            async with _slot(peer, deadline):
                connection = peer.take_idle() or await self._connect(key[0], deadline)
                await self._use(peer, connection, _Exchange(direction, segment, parts), deadline)
        except TransferError as error:
            return error
        finally:
            peer.users -= 1
        return None

    async def _use(self, peer: _Peer, connection: _Connection, exchange: "_Exchange", deadline: Deadline) -> None:
        sock = connection.sock
        whole = False
        try:
            await self._pool.run(lambda: exchange.run(connection, deadline), lambda: shut_down(sock), deadline)
            whole = not self._pool.closed
        finally:
            if whole:
                peer.idle.append(connection)
            else:
                sock.close()

    async def _connect(self, address: str, deadline: Deadline) -> _Connection:
        self._drop_unused()
        if self._pool.closed:
            raise PeerUnreachableError("the transport is closed")
        try:
            host, port = split_address(address)
        except ConfigError as error:
            raise PeerUnreachableError(error.message) from error
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(deadline.remaining()):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
            tune(sock)
        except TimeoutError as error:
            sock.close()
            raise TransferTimeoutError(f"connecting to {address} took too long") from error
        except OSError as error:
            sock.close()
            raise PeerUnreachableError(f"cannot connect to {address}: {error.strerror or error}") from error
        except BaseException:
            sock.close()
            raise
        return _Connection(sock)

    def _drop_unused(self) -> None:
        """Forget peers with no live connection, so that dead ones do not pile up. Called before each new connection."""
        for key, peer in list(self._peers.items()):
            dead = [one for one in peer.idle if not _usable(one.sock)]
            peer.idle = [one for one in peer.idle if one not in dead]
            for one in dead:
                one.sock.close()
            if not peer.users and not peer.idle:
                del self._peers[key]


class _Exchange:
    """One stripe's round trips on one connection. Runs in a thread."""

    def __init__(self, direction: Direction, segment: Segment, parts: list[Part]) -> None:
        self._direction = direction
        self._segment = segment
        self._parts = parts

    def run(self, connection: _Connection, deadline: Deadline) -> None:
        """Raises TransferError; then the connection is of no further use."""
        try:
            if not connection.greeted:
                self._greet(connection.sock, deadline.remaining)
                connection.greeted = True
            for start in range(0, len(self._parts), wire.MAX_OPS):
                self._frame(connection, self._parts[start : start + wire.MAX_OPS], deadline.remaining)
        except TimeoutError as error:
            raise deadline.error() from error
        except OSError as error:
            raise PeerUnreachableError(f"segment {self._segment.id}: the connection broke: {error}") from error

    def _greet(self, sock: socket.socket, budget: Budget) -> None:
        send_views(sock, [wire.pack_hello(self._segment.id)], budget)
        header = _reply(sock, budget)
        wire.check_text(header, wire.FrameKind.WELCOME)
        payload = recv_bytes(sock, header.payload_bytes, budget)
        size_bytes, found = int.from_bytes(payload[:8], "little"), payload[8:].decode(errors="replace")
        if (found, size_bytes) != (self._segment.id, self._segment.size_bytes):
            raise SegmentUnknownError(
                f"wanted segment {self._segment.id} of {self._segment.size_bytes} bytes, "
                f"the peer holds {found} of {size_bytes}"
            )

    def _frame(self, connection: _Connection, parts: Sequence[Part], budget: Budget) -> None:
        request_id = next(connection.request_ids)
        writing = self._direction == "write"
        kind = wire.FrameKind.WRITE if writing else wire.FrameKind.READ
        request = wire.pack_request(kind, [(part.offset, part.num_bytes) for part in parts], request_id)
        views = [view for part in parts for view in part.views]
        total = sum(part.num_bytes for part in parts)
        send_views(connection.sock, [request, *views] if writing else [request], budget)
        wanted = (
            wire.Header(wire.FrameKind.WRITTEN, len(parts), request_id=request_id)
            if writing
            else wire.Header(wire.FrameKind.DATA, len(parts), payload_bytes=total, request_id=request_id)
        )
        header = _reply(connection.sock, budget)
        if header != wanted:
            raise TransferProtocolError(f"expected {wanted}, the peer sent {header}")
        if not writing:
            recv_views(connection.sock, views, budget)


def _reply(sock: socket.socket, budget: Budget) -> wire.Header:
    """The next frame's header. Raises what an ERROR frame says."""
    header = wire.parse_header(recv_bytes(sock, wire.HEADER_BYTES, budget))
    if header.kind is wire.FrameKind.ERROR:
        wire.check_text(header, wire.FrameKind.ERROR)
        raise wire.parse_error(header, recv_bytes(sock, header.payload_bytes, budget))
    return header


def _usable(sock: socket.socket) -> bool:
    """Whether an idle connection is still open, with nothing unasked-for in it."""
    sock.setblocking(False)
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.asynccontextmanager
async def _slot(peer: _Peer, deadline: Deadline) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(deadline.remaining()):
            await peer.free.acquire()
    except TimeoutError as error:
        raise deadline.error() from error
    try:
        yield
    finally:
        peer.free.release()
