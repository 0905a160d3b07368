"""One stripe's round trips on one connection of the TCP transport: in a thread, or, if it is small, on the event loop.

Owns no connection. After an error or a cancellation the connection must be closed. On the loop nothing blocks: 4 KiB
cost two system calls and one wake-up there (about 45 us), where a thread's hand-over and back took 0.2 ms more.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence

from kvcore.errors import (
    PeerUnreachableError,
    SegmentUnknownError,
    TransferError,
    TransferProofError,
    TransferProtocolError,
)
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.types import Segment
from transfer.base import Direction
from transfer.blocking import BatchDeadline
from transfer.greeting import InitiatorGreeting, greeting_keys
from transfer.stripes import OpSlice, shown_groups
from transfer.tcp import wire
from transfer.tcp.connection import Connection
from transfer.tcp.frame_macs import PLAIN, FrameMacs, RunningMac
from transfer.tcp.sockets import Check, not_empty, recv_bytes, recv_views, send_now, send_views

_SHOWN_BYTES = 1 << 20
"""What has been moved is shown this often, while it is still in the cache."""
_PACKET_BYTES = 16 << 10
"""An answer longer than this arrives in several packets: the loop is woken when it is all there."""


class Exchange:
    """Moves `parts` to or from `segment`. One use."""

    def __init__(
        self,
        direction: Direction,
        segment: Segment,
        parts: list[OpSlice],
        trust: ClusterTrust = OPEN,
        *,
        sealed: bool = False,
    ) -> None:
        """`sealed`: frames have MACs, in a cluster with a secret."""
        self._trust = trust
        self._sealed = sealed
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
                connection.macs = self._greet(connection.sock, check)
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
        sock, macs = connection.sock, connection.macs
        request, wanted = self._request(connection, self._parts)
        views = [view for part in self._parts for view in part.views]
        outgoing = not_empty([request, *views, macs.seal(views)]) if self._writing else [memoryview(request)]
        answer_bytes = wire.HEADER_BYTES + wanted.payload_bytes + macs.tag_bytes * (1 if self._writing else 2)
        future = connection.expect(wanted, [] if self._writing else views)
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
        """The next request's head, with its MAC, and the header that answers it."""
        request_id = next(connection.request_ids)
        kind = wire.FrameKind.WRITE if self._writing else wire.FrameKind.READ
        request = wire.pack_request(kind, [(part.offset, part.num_bytes) for part in parts], request_id)
        request += connection.macs.seal([request])
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
        A MAC looks at everything, but not at a write that was gone over before.
        """
        sock, macs = connection.sock, connection.macs
        request, wanted = self._request(connection, parts)
        views = [view for part in parts for view in part.views]
        shown = any(part.show is not None for part in parts)
        if self._writing and not shown:
            send_views(sock, [request, *views, macs.seal(views)], check)  # case 1
        else:
            send_views(sock, [request], check)
        if self._writing and shown:
            mac = macs.sealing()
            _show_each(parts, lambda group, _: send_views(sock, group, check), mac)  # case 2
            send_views(sock, [mac.tag()], check)
        wire.check_reply(_reply(sock, check, macs), wanted)
        if self._writing:
            return
        mac = macs.checking()
        if shown or macs:

            def receive(group: list[memoryview], behind: int) -> None:
                recv_views(sock, group, check, behind=behind + macs.tag_bytes)

            _show_each(parts, receive, mac)  # case 3
        else:
            recv_views(sock, views, check)  # case 4
        macs.check_tag(mac, recv_bytes(sock, macs.tag_bytes, check))

    def _greet(self, sock: socket.socket, check: Check) -> FrameMacs:
        if self._trust.secrets is None:
            send_views(sock, [wire.pack_hello(self._segment.id)], check)
            macs = PLAIN
        else:
            macs = self._prove(sock, check)
        header = _reply(sock, check, macs)
        wire.check_text(header, wire.FrameKind.WELCOME)
        payload = _text(sock, header, check, macs)
        size_bytes, found = int.from_bytes(payload[:8], "little"), payload[8:].decode(errors="replace")
        if (found, size_bytes) != (self._segment.id, self._segment.size_bytes):
            raise SegmentUnknownError(
                f"wanted segment {self._segment.id} of {self._segment.size_bytes} bytes, "
                f"the peer holds {found} of {size_bytes}"
            )
        return macs

    def _prove(self, sock: socket.socket, check: Check) -> FrameMacs:
        """The MACs of all frames behind the proof."""
        kind = wire.FrameKind.SEALED_HELLO if self._sealed else wire.FrameKind.PROVEN_HELLO
        greeting = InitiatorGreeting(greeting_keys(self._trust), wire.GREETED[kind], self._segment.id)
        send_views(sock, [wire.pack_greeting(kind, greeting.hello())], check)
        header = _reply(sock, check, PLAIN)
        if header.kind is wire.FrameKind.WELCOME:
            raise TransferProofError(f"what serves segment {self._segment.id} gives no proof of this cluster's secret")
        wire.check_text(header, wire.FrameKind.CHALLENGE)
        proof = greeting.answer(recv_bytes(sock, header.payload_bytes, check))
        send_views(sock, [wire.pack_greeting(wire.FrameKind.PROOF, proof)], check)
        keys = greeting.direction_keys
        return FrameMacs(keys.initiator, keys.target) if self._sealed else PLAIN

    def _broke(self, error: OSError) -> TransferError:
        return PeerUnreachableError(f"segment {self._segment.id}: the connection broke: {error}")


def _reply(sock: socket.socket, check: Check, macs: FrameMacs) -> wire.Header:
    """The next frame's header. Raises what an ERROR frame says."""
    raw = recv_bytes(sock, wire.HEADER_BYTES + macs.tag_bytes, check)
    head = raw[: wire.HEADER_BYTES]
    macs.check([head], raw[wire.HEADER_BYTES :])
    header = wire.parse_header(head)
    if header.kind is wire.FrameKind.ERROR:
        wire.error_text_bytes(header)
        raise wire.parse_error(header, _text(sock, header, check, macs))
    return header


def _text(sock: socket.socket, header: wire.Header, check: Check, macs: FrameMacs) -> bytearray:
    """The payload of a frame whose length was checked."""
    text = recv_bytes(sock, header.payload_bytes, check)
    if text:
        macs.check([text], recv_bytes(sock, macs.tag_bytes, check))
    return text


def _show_each(parts: Sequence[OpSlice], move: Callable[[list[memoryview], int], None], mac: RunningMac) -> None:
    """Call `move` for a group of views and the number of bytes that follow it, then show the group; and so on."""
    behind = sum(part.num_bytes for part in parts)
    for group in shown_groups(parts, _SHOWN_BYTES):
        behind -= sum(view.nbytes for view, _ in group)
        move([view for view, _ in group], behind)
        for view, part in group:
            mac.show(view)
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
