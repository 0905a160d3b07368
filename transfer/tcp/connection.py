"""One connection of an initiator, used by threads and by the event loop in turn.

Owns the socket, and whether the loop watches it. Knows of one exchange at a time only the reply that it waits for.
"""

import asyncio
import contextlib
import itertools
import socket
import struct

from kvcore.errors import TransferError
from transfer.tcp import wire
from transfer.tcp.frame_macs import PLAIN, FrameMacs
from transfer.tcp.sockets import not_empty, recv_now


class _PendingReply:
    """What is to arrive on a connection that the loop watches: `wanted`, and then its payload into `views`."""

    __slots__ = ("_header", "_macs", "_raw", "_rest", "_tag", "_views", "_wanted", "future")

    def __init__(
        self, wanted: wire.Header, views: list[memoryview], future: "asyncio.Future[None]", macs: FrameMacs
    ) -> None:
        self.future = future
        self._wanted = wanted
        self._views = views
        self._macs = macs
        self._raw = bytearray(wire.HEADER_BYTES)
        self._tag = bytearray(macs.tag_bytes)
        self._rest = not_empty([self._raw, self._tag])
        self._header: wire.Header | None = None

    def receive(self, sock: socket.socket) -> bool:
        """Receive what is there; whether that was all. Raises OSError, or TransferError for another reply.

        `_rest` is what is still to be filled: first the header; then, told by the header, the payload or an error's
        text; either with its MAC. Each time that it is full, the next begins at once: it may have come in the same
        packet.
        """
        if not recv_now(sock, self._rest):
            return False
        if self._header is None:  # the header is complete
            self._macs.check([self._raw], self._tag)
            self._header = header = wire.parse_header(self._raw)
            if header.kind is wire.FrameKind.ERROR:
                self._views = [memoryview(bytearray(wire.error_text_bytes(header)))]
            else:
                wire.check_reply(header, self._wanted)
            self._rest = not_empty([*self._views, self._tag] if header.payload_bytes else [])
            if not recv_now(sock, self._rest):
                return False
        if self._header.payload_bytes:
            self._macs.check(self._views, self._tag)
        if self._header.kind is wire.FrameKind.ERROR:
            raise wire.parse_error(self._header, bytes(self._views[0]))
        return True


class Connection:
    """A socket to a peer, used by one exchange at a time: by a thread, or by the loop, which then watches it.

    Between exchanges the loop may go on watching: closing by the peer is then noticed at once (`usable`).
    """

    __slots__ = ("_broken", "_loop", "_reply", "greeted", "macs", "request_ids", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.greeted = False
        """The peer has said that it holds the segment."""
        self.macs = PLAIN
        """Of its frames, since the greeting."""
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
        self._reply = _PendingReply(wanted, views, future, self.macs)
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

    def abort(self) -> None:
        """As `close`, and what the peer has not received yet is dropped: nobody waits for its end, and the room that it
        was meant for may soon be another's."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

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
