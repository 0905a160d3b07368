"""One stripe's round trips on one connection of the TCP transport: in a thread, or, if it is small, on the event loop.

Owns no connection. After an error or a cancellation the connection must be closed. On the loop nothing blocks: 4 KiB
cost two system calls and one wake-up there (about 45 us), where a thread's hand-over and back took 0.2 ms more.
"""

import asyncio
import itertools
import socket
from collections.abc import Callable, Sequence

from kvcore.errors import PeerUnreachableError, SegmentUnknownError, TransferError, TransferProtocolError
from kvcore.types import Segment
from transfer.base import Direction
from transfer.blocking import BatchDeadline
from transfer.stripes import OpSlice, shown_groups
from transfer.tcp import wire
from transfer.tcp.sockets import Check, not_empty, recv_bytes, recv_now, recv_views, send_now, send_views

_SHOWN_BYTES = 1 << 20
"""What has been moved is shown this often, while it is still in the cache."""
_PACKET_BYTES = 16 << 10
"""An answer longer than this arrives in several packets: the loop is woken when it is all there."""


class _PendingReply:
    """What is to arrive on a connection that the loop watches: `wanted`, and then its payload into `views`."""

    __slots__ = ("_header", "_raw", "_rest", "_text", "_views", "_wanted", "future")

    def __init__(self, wanted: wire.Header, views: list[memoryview], future: "asyncio.Future[None]") -> None:
        self.future = future
        self._wanted = wanted
        self._views = views
        self._raw = bytearray(wire.HEADER_BYTES)
        self._rest = [memoryview(self._raw)]
        self._header: wire.Header | None = None
        self._text = bytearray()

    def receive(self, sock: socket.socket) -> bool:
        """Receive what is there; whether that was all. Raises OSError, or TransferError for another reply.

        `_rest` is what is still to be filled: first the header; then, told by the header, the payload or an error's
        text. Each time that it is full, the next begins at once: it may have come in the same packet.
        """
        if not recv_now(sock, self._rest):
            return False
        if self._header is None:  # the header is complete
            self._header = header = wire.parse_header(self._raw)
            if header.kind is wire.FrameKind.ERROR:
                self._text = bytearray(_text_bytes(header))
                self._rest = not_empty([self._text])
            else:
                _expect(header, self._wanted)
                self._rest = self._views
            if not recv_now(sock, self._rest):
                return False
        if self._header.kind is wire.FrameKind.ERROR:
            raise wire.parse_error(self._header, self._text)
        return True


class Connection:
    """A socket to a peer, used by one exchange at a time: by a thread, or by the loop, which then watches it.

    Between exchanges the loop may go on watching: closing by the peer is then noticed at once (`usable`).
    """

    __slots__ = ("_broken", "_loop", "_reply", "greeted", "request_ids", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.greeted = False
        """The peer has said that it holds the segment."""
        self.request_ids = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        """That which watches it."""
        self._reply: _PendingReply | None = None
        self._broken = False

    def __repr__(self) -> str:
        watched = "loop" if self._loop is not None else "thread"
        state = "broken" if self._broken else "waiting" if self._reply is not None else "idle"
        return f"<Connection fd={self.sock.fileno()} greeted={self.greeted} by={watched} {state}>"

    @property
    def usable(self) -> bool:
        """Of an idle connection: whether it is still open, with nothing in it that nobody asked for.

        Three cases: the loop watches it, and would have stopped if anything had come; the loop has stopped for that
        reason; nobody watches it, so the kernel is asked.
        """
        if self._loop is not None:
            return True
        if self._broken:
            return False
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def expect(self, wanted: wire.Header, views: list[memoryview]) -> "asyncio.Future[None]":
        """Let the loop receive `wanted` and its payload; the future ends when it has, or with what is wrong."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self.sock, self._readable)
        future = self._loop.create_future()
        self._reply = _PendingReply(wanted, views, future)
        return future

    def unwatch(self) -> None:
        """The loop watches it no longer: a thread may use it."""
        if self._loop is not None:
            self._loop.remove_reader(self.sock)
            self._loop = None

    def close(self) -> None:
        """Idempotent; no thread may be using it."""
        self.unwatch()
        self._reply = None
        self.sock.close()

    def _readable(self) -> None:
        """Called by the loop. Four cases:
        1. nobody waits for anything: the peer closed the connection, or sent what nobody asked for: it is broken;
        2. part of the reply has come: wait for the rest;
        3. the peer broke the protocol, sent an error, or the connection broke: the waiting exchange gets the error;
        4. all of it has come: the waiting exchange goes on.
        In cases 3 and 4 the exchange may have been cancelled or late meanwhile: then its future is done already.
        """
        reply = self._reply
        if reply is None:  # case 1
            self._broken = True
            self.unwatch()
            return
        try:
            if not reply.receive(self.sock):  # case 2
                # The kernel woke us for less than was waited for (a small buffer, loss on the way): the rest may be
                # less than that too, and would wake nobody.
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                return
        except (OSError, TransferError) as error:  # case 3
            self.unwatch()
            if not reply.future.done():
                reply.future.set_exception(error)
        else:  # case 4
            if not reply.future.done():
                reply.future.set_result(None)
        self._reply = None


class Exchange:
    """Moves `parts` to or from `segment`. One use."""

    def __init__(self, direction: Direction, segment: Segment, parts: list[OpSlice]) -> None:
        self._writing = direction == "write"
        self._segment = segment
        self._parts = parts
        self._num_bytes = sum(part.num_bytes for part in parts)

    def __repr__(self) -> str:
        direction = "write" if self._writing else "read"
        return f"<Exchange {direction} {self._segment.id} parts={len(self._parts)} bytes={self._num_bytes}>"

    def fits_the_loop(self, max_bytes: int) -> bool:
        """Whether it is one frame of at most `max_bytes`."""
        return self._num_bytes <= max_bytes and len(self._parts) <= wire.MAX_OPS

    def run(self, connection: Connection, deadline: BatchDeadline) -> None:
        """In a thread: blocks. A caller that is late or cancelled shuts the socket down, which ends it. Raises
        TransferError."""
        check = deadline.remaining
        try:
            connection.sock.setblocking(True)  # libuv makes what it has watched non-blocking
            if not connection.greeted:
                self._greet(connection.sock, check)
                connection.greeted = True
            for start in range(0, len(self._parts), wire.MAX_OPS):
                self._frame(connection, self._parts[start : start + wire.MAX_OPS], check)
        except OSError as error:
            raise self._broke(error) from error

    async def run_on_loop(self, connection: Connection, deadline: BatchDeadline) -> None:
        """For an exchange that `fits_the_loop`, on a connection that was greeted. Raises TransferError.

        One future stands for the reply. It ends in one of four ways, and whatever waits here ends with it:
        1. the reply has come (`Connection._readable`);
        2. the peer sent something else, or the connection broke while receiving (likewise);
        3. the timer ended it with the deadline's error;
        4. this task was cancelled while it waited for the reply: asyncio cancels the future.
        Sending waits for room in the socket or for that future, so that a reply that comes too early ends it too.
        """
        sock = connection.sock
        request, wanted = self._request(connection, self._parts)
        views = [view for part in self._parts for view in part.views]
        outgoing = [memoryview(request), *views] if self._writing else [memoryview(request)]
        answer_bytes = wire.HEADER_BYTES + wanted.payload_bytes
        future = connection.expect(wanted, [] if self._writing else list(views))
        timer = future.get_loop().call_later(deadline.remaining(), _late, future, deadline)
        try:
            while not send_now(sock, outgoing):
                await _sendable(sock, future)
            if answer_bytes > _PACKET_BYTES:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, answer_bytes)
            await future
            if answer_bytes > _PACKET_BYTES:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        except OSError as error:
            raise self._broke(error) from error
        finally:
            timer.cancel()
            if future.done() and not future.cancelled():
                future.exception()  # seen, if it was the sending that failed
        for part in self._parts:
            if part.show is not None:
                for view in part.views:
                    part.show(view)

    def _request(self, connection: Connection, parts: Sequence[OpSlice]) -> tuple[bytes, wire.Header]:
        """The next request's first bytes and the header that answers it."""
        request_id = next(connection.request_ids)
        kind = wire.FrameKind.WRITE if self._writing else wire.FrameKind.READ
        request = wire.pack_request(kind, [(part.offset, part.num_bytes) for part in parts], request_id)
        if self._writing:
            return request, wire.Header(wire.FrameKind.WRITTEN, len(parts), request_id=request_id)
        total = sum(part.num_bytes for part in parts)
        return request, wire.Header(wire.FrameKind.DATA, len(parts), payload_bytes=total, request_id=request_id)

    def _frame(self, connection: Connection, parts: Sequence[OpSlice], check: Check) -> None:
        """One request and its reply. Four cases:
        1. a write that nobody looks at: request and bytes in the same system calls;
        2. a write that is looked at: the request, then group by group, each shown after it was sent;
        3. a read that is looked at: after the reply's header group by group, each shown after it was received;
        4. a read that nobody looks at: all at once after the header.
        """
        sock = connection.sock
        request, wanted = self._request(connection, parts)
        views = [view for part in parts for view in part.views]
        shown = any(part.show is not None for part in parts)
        if self._writing and not shown:
            send_views(sock, [request, *views], check)  # case 1
        else:
            send_views(sock, [request], check)
        if self._writing and shown:
            _show_each(parts, lambda group, _: send_views(sock, group, check))  # case 2
        _expect(_reply(sock, check), wanted)
        if self._writing:
            return
        if shown:
            _show_each(parts, lambda group, behind: recv_views(sock, group, check, behind=behind))  # case 3
        else:
            recv_views(sock, views, check)  # case 4

    def _greet(self, sock: socket.socket, check: Check) -> None:
        send_views(sock, [wire.pack_hello(self._segment.id)], check)
        header = _reply(sock, check)
        wire.check_text(header, wire.FrameKind.WELCOME)
        payload = recv_bytes(sock, header.payload_bytes, check)
        size_bytes, found = int.from_bytes(payload[:8], "little"), payload[8:].decode(errors="replace")
        if (found, size_bytes) != (self._segment.id, self._segment.size_bytes):
            raise SegmentUnknownError(
                f"wanted segment {self._segment.id} of {self._segment.size_bytes} bytes, "
                f"the peer holds {found} of {size_bytes}"
            )

    def _broke(self, error: OSError) -> TransferError:
        return PeerUnreachableError(f"segment {self._segment.id}: the connection broke: {error}")


def _reply(sock: socket.socket, check: Check) -> wire.Header:
    """The next frame's header. Raises what an ERROR frame says."""
    header = wire.parse_header(recv_bytes(sock, wire.HEADER_BYTES, check))
    if header.kind is wire.FrameKind.ERROR:
        raise wire.parse_error(header, recv_bytes(sock, _text_bytes(header), check))
    return header


def _text_bytes(header: wire.Header) -> int:
    wire.check_text(header, wire.FrameKind.ERROR)
    return header.payload_bytes


def _expect(header: wire.Header, wanted: wire.Header) -> None:
    if header != wanted:
        raise TransferProtocolError(f"expected {wanted}, the peer sent {header}")


def _show_each(parts: Sequence[OpSlice], move: Callable[[list[memoryview], int], None]) -> None:
    """Call `move` for a group of views and the number of bytes that follow it, then show the group; and so on."""
    behind = sum(part.num_bytes for part in parts)
    for group in shown_groups(parts, _SHOWN_BYTES):
        behind -= sum(view.nbytes for view, _ in group)
        move([view for view, _ in group], behind)
        for view, part in group:
            if part.show is not None:
                part.show(view)


async def _sendable(sock: socket.socket, reply: "asyncio.Future[None]") -> None:
    """Wait until the socket takes more, or raise what `reply` ended with meanwhile: an error, or too late."""
    loop = reply.get_loop()
    writable: asyncio.Future[None] = loop.create_future()
    loop.add_writer(sock, _wake, writable)
    try:
        await asyncio.wait({writable, reply}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_writer(sock)
    if reply.done():
        reply.result()
        raise TransferProtocolError("the peer answered before it was asked")


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _late(future: "asyncio.Future[None]", deadline: BatchDeadline) -> None:
    if not future.done():
        future.set_exception(deadline.error())
