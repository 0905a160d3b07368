"""What a host receives and sends of one frame, with MACs where the connection has them.

Owns no socket and no segment. Bytes go straight between the two; only what is sent with a MAC is copied first.
"""

import logging
import socket
from collections.abc import Sequence

from kvcore.errors import TransferError
from kvcore.telemetry import log_fields
from transfer.blocking import BatchDeadline
from transfer.stripes import groups
from transfer.tcp import wire
from transfer.tcp.frame_macs import FrameMacs
from transfer.tcp.sockets import Check, Inbox, limit_waits, send_views

_LOG = logging.getLogger("transfer")
_GOODBYE_BYTES = 64 << 10
_SEALED_BYTES = 256 << 10
"""Of the segment, copied out before a MAC is made of them and they are sent: small enough to stay in the cache."""
_CHECKED_BYTES = 1 << 20
"""What was received is gone over as often, while it is still in the cache."""


def receive(inbox: Inbox, views: Sequence[memoryview], macs: FrameMacs, check: Check) -> None:
    """Fill the views. With MACs they are gone over as they come, from where they lie; raises TransferForgedError: then
    the writer is not told that they have landed."""
    if not macs:
        inbox.fill(views, check)
        return
    behind = sum(view.nbytes for view in views) + macs.tag_bytes
    if behind <= _CHECKED_BYTES:
        inbox.fill(views, check, behind=macs.tag_bytes)
        macs.check(views, inbox.take(macs.tag_bytes, check))
        return
    mac = macs.checking()
    for group in groups(views, _CHECKED_BYTES):
        behind -= sum(view.nbytes for view in group)
        inbox.fill(group, check, behind=behind)
        for view in group:
            mac.show(view)
    macs.check_tag(mac, inbox.take(macs.tag_bytes, check))


def send(sock: socket.socket, head: bytes, views: Sequence[memoryview], macs: FrameMacs, check: Check) -> None:
    """A frame. With MACs each piece of the segment is copied first: what is sent is what the MAC is of, also where
    somebody writes there meanwhile (the reader finds that by the chunk's own MAC)."""
    if not macs:
        send_views(sock, [head, *views], check)
        return
    waiting: list[memoryview | bytes] = [head, macs.seal([head])]
    left = sum(view.nbytes for view in views)
    if left <= _SEALED_BYTES:
        copied = b"".join(views)
        send_views(sock, [*waiting, copied, macs.seal([copied])], check)
        return
    mac, scratch = macs.sealing(), memoryview(bytearray(_SEALED_BYTES))
    for group in groups(views, _SEALED_BYTES):
        filled = 0
        for view in group:
            scratch[filled : filled + view.nbytes] = view
            filled += view.nbytes
        mac.show(scratch[:filled])
        waiting.append(scratch[:filled])
        left -= filled
        if left:
            send_views(sock, waiting, check)
            waiting = []
    send_views(sock, [*waiting, mac.tag()], check)


def send_text(sock: socket.socket, frame: bytes, macs: FrameMacs, check: Check) -> None:
    """A whole frame without a table."""
    head, text = frame[: wire.HEADER_BYTES], frame[wire.HEADER_BYTES :]
    send_views(sock, [head, macs.seal([head]), text, macs.seal([text]) if text else b""], check)


def send_error(sock: socket.socket, error: TransferError, macs: FrameMacs, goodbye_s: float) -> None:
    """Tell the peer why, then read on for at most `goodbye_s`: closing with bytes unread would reset the connection
    before the peer has read the error."""
    deadline = BatchDeadline(goodbye_s)
    try:
        limit_waits(sock, receive_s=goodbye_s, send_s=goodbye_s)
        send_text(sock, wire.pack_error(error), macs, deadline.remaining)
        sock.shutdown(socket.SHUT_WR)
        scratch = bytearray(_GOODBYE_BYTES)
        drained = 0
        while drained < _GOODBYE_BYTES:
            deadline.remaining()
            received = sock.recv_into(scratch)
            if received == 0:
                return
            drained += received
    except (TransferError, OSError) as gone:
        log_fields(_LOG, logging.DEBUG, "transfer.goodbye_failed", error=str(gone))
