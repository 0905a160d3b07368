"""The target's side of the TCP transport: serves one segment to peers (docs/wire-formats.md has the protocol).

Owns the listening socket and one thread a connection, bounded; bytes go straight between socket and segment.
Nothing is written into the segment before a request's whole header and table were checked.
"""

import asyncio
import logging
import socket
import threading
from collections import Counter

from kvcore.errors import (
    ConfigError,
    SegmentUnknownError,
    TransferError,
    TransferProofError,
    TransferProtocolError,
)
from kvcore.peer_log import PeerLog
from kvcore.telemetry import log_fields
from kvcore.trust.opening import OPEN, ClusterTrust
from transfer.base import refusal
from transfer.blocking import BatchDeadline, ended
from transfer.greeting import TargetGreeting, greeting_keys
from transfer.tcp import wire
from transfer.tcp.frame_macs import PLAIN, FrameMacs
from transfer.tcp.limits import TcpLimits
from transfer.tcp.served_frames import receive, send, send_error, send_text
from transfer.tcp.sockets import Inbox, join_address, limit_waits, send_views, shut_down, tune

_LOG = logging.getLogger("transfer")
_BACKLOG = 128
_AHEAD_BYTES = 16 << 10
"""Received with a request's header. A small write is one system call; of a large one that much is copied twice."""


class TcpSegmentHost:
    """SegmentHost over TCP.

    `memory` is the whole segment; it must outlive this host's `aclose`. `advertise_host` is what peers are told, where
    it differs from what is bound.
    """

    def __init__(
        self,
        segment_id: str,
        memory: memoryview,
        host: str,
        port: int = 0,
        *,
        advertise_host: str | None = None,
        limits: TcpLimits = TcpLimits(),
        trust: ClusterTrust = OPEN,
        sealed: bool = False,
    ) -> None:
        """`sealed`: nobody is served whose frames have no MACs."""
        self._sealed = sealed
        self._segment_id = segment_id
        self._memory = memory
        self._bind = (host, port)
        self._advertise_host = advertise_host or host
        self._limits = limits
        self._trust = trust
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._of_peer: Counter[str] = Counter()
        self._log = PeerLog(_LOG)
        self.refused: Counter[str] = Counter()
        """As SegmentHost.refused."""
        self._port = port

    def __repr__(self) -> str:
        state = "closing" if self._closing.is_set() else "serving" if self._listener is not None else "not started"
        connections = f"{len(self._connections)}/{self._limits.max_connections}"
        return f"<TcpSegmentHost {self._segment_id} {self.address} {state} connections={connections}>"

    @property
    def address(self) -> str:
        """As SegmentHost.address."""
        return join_address(self._advertise_host, self._port)

    @property
    def num_connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    async def start(self) -> None:
        """As SegmentHost.start."""
        host, port = self._bind
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(
                f"cannot listen for transfers on {join_address(host, port)}: {error.strerror or error}; "
                "give the node another host or transfer_port, or 0 for any free port"
            ) from error
        self._port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(
            target=self._accept, args=(self._listener,), name="kvferry-tcp-accept", daemon=True
        )
        self._acceptor.start()

    async def aclose(self) -> None:
        """As SegmentHost.aclose. Peers in the middle of a batch see their connection break."""
        self._closing.set()
        if self._listener is None or self._acceptor is None:
            return
        shut_down(self._listener)
        with self._lock:
            threads = [self._acceptor, *self._connections.values()]
            for sock in self._connections:
                shut_down(sock)
        self._listener.close()
        async with asyncio.timeout(self._limits.close_s):
            await ended(*threads)

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, (peer, *_) = listener.accept()
            except OSError as error:
                if not self._closing.wait(self._limits.accept_pause_s):  # out of descriptors, say: try again soon
                    self._log.say(logging.WARNING, "transfer.accept_failed", "accept", None, error=str(error))
                continue
            if refused := self._start_serving(sock, peer):
                sock.close()
                self._log.say(logging.WARNING, "transfer.connection_refused", "refused", peer, reason=refused)

    def _start_serving(self, sock: socket.socket, peer: str) -> str | None:
        """Serve a connection in a thread of its own; None, or the reason why it is refused."""
        thread = threading.Thread(target=self._serve, args=(sock, peer), name="kvferry-tcp-serve", daemon=True)
        with self._lock:
            if self._closing.is_set():
                return "closing"
            if len(self._connections) >= self._limits.max_connections:
                return f"{self._limits.max_connections} are open"
            if self._of_peer[peer] >= self._limits.max_per_peer:
                return f"{self._limits.max_per_peer} are open from this address"
            self._connections[sock] = thread
            self._of_peer[peer] += 1
            try:
                thread.start()
            except RuntimeError as error:  # the machine gives no more threads; it may later
                self._forget(sock, peer)
                return str(error)
        return None

    def _forget(self, sock: socket.socket, peer: str) -> None:
        if self._connections.pop(sock, None) is not None:
            self._of_peer[peer] -= 1
            if not self._of_peer[peer]:
                del self._of_peer[peer]

    def _serve(self, sock: socket.socket, peer: str) -> None:
        """One connection, to its end."""
        macs = PLAIN
        try:
            tune(sock, self._limits)
            limit_waits(sock, receive_s=self._limits.message_timeout_s, send_s=self._limits.message_timeout_s)
            inbox = Inbox(sock, _AHEAD_BYTES)
            macs = self._greet(sock, inbox)
            while self._serve_request(sock, inbox, macs):
                pass
        except TransferProtocolError as error:
            self._refuse(peer, error)
            send_error(sock, error, macs, self._limits.goodbye_s)
        except SegmentUnknownError as error:
            send_error(sock, error, macs, self._limits.goodbye_s)
        except (TransferError, OSError) as error:  # OSError: timeouts too
            log_fields(_LOG, logging.DEBUG, "transfer.connection_ended", error=str(error))
        finally:
            with self._lock:
                self._forget(sock, peer)
            sock.close()

    def _refuse(self, peer: str, error: TransferProtocolError) -> None:
        reason = refusal(error)
        with self._lock:
            self.refused[reason] += 1
        self._log.say(logging.WARNING, "transfer.peer_broke_protocol", reason, peer, reason=reason, error=error.message)

    def _greet(self, sock: socket.socket, inbox: Inbox) -> FrameMacs:
        """The MACs of all that follows the proof."""
        proven = self._trust.secrets is not None
        deadline = BatchDeadline(self._limits.greeting_s if proven else self._limits.message_timeout_s)
        if proven:
            limit_waits(sock, receive_s=self._limits.greeting_s, send_s=self._limits.greeting_s)
        header = wire.parse_header(inbox.take(wire.HEADER_BYTES, deadline.remaining))
        macs = PLAIN
        if proven:
            macs = self._check_proof(sock, inbox, header, deadline)
        else:
            wire.check_text(header, wire.FrameKind.HELLO)
            self._check_segment(inbox.take(header.payload_bytes, deadline.remaining).decode(errors="replace"))
        welcome = wire.pack_welcome(self._segment_id, self._memory.nbytes)
        send_text(sock, welcome, macs, deadline.remaining)
        limit_waits(sock, receive_s=self._limits.idle_timeout_s)
        return macs

    def _check_segment(self, wanted: str) -> None:
        if wanted != self._segment_id:
            raise SegmentUnknownError(f"segment {wanted} is not here, this is {self._segment_id}")

    def _check_proof(
        self, sock: socket.socket, inbox: Inbox, header: wire.Header, deadline: BatchDeadline
    ) -> FrameMacs:
        """That the initiator knows the cluster's secret. Proves nothing for another segment: a stranger at a dead
        node's address would show that proof as its own. Raises TransferProofError, SegmentUnknownError."""
        if header.kind is wire.FrameKind.HELLO:
            raise TransferProofError("this cluster has a secret, and the initiator gives no proof of it")
        sealed = header.kind is wire.FrameKind.SEALED_HELLO
        if self._sealed and not sealed:
            raise TransferProofError("this node wants MACs of frames, as its transport.integrity says")
        wire.check_text(header, wire.FrameKind.SEALED_HELLO if sealed else wire.FrameKind.PROVEN_HELLO)
        greeting = TargetGreeting(greeting_keys(self._trust), wire.GREETED[header.kind])
        wanted, challenge = greeting.challenge(inbox.take(header.payload_bytes, deadline.remaining))
        self._check_segment(wanted)
        send_views(sock, [wire.pack_greeting(wire.FrameKind.CHALLENGE, challenge)], deadline.remaining)
        header = wire.parse_header(inbox.take(wire.HEADER_BYTES, deadline.remaining))
        wire.check_text(header, wire.FrameKind.PROOF)
        greeting.check(inbox.take(header.payload_bytes, deadline.remaining))
        limit_waits(sock, send_s=self._limits.message_timeout_s)
        keys = greeting.direction_keys
        return FrameMacs(keys.target, keys.initiator) if sealed else PLAIN

    def _serve_request(self, sock: socket.socket, inbox: Inbox, macs: FrameMacs) -> bool:
        """Serve one request; False when the peer closed the connection instead of sending one.

        The socket's receive timeout costs a system call each time that it changes. It is the idle timeout between
        requests, and is shortened to the message timeout only where the rest of a request has still to come:
        1. the header and all that follows were read ahead: never changed;
        2. the header is complete, but not what follows: changed before the rest is received;
        3. not even the header is complete: changed before it is received.
        In cases 2 and 3 it is set back at the end.
        """
        if not inbox.wait():
            return False
        deadline = BatchDeadline(self._limits.message_timeout_s)
        whole = inbox.num_bytes >= wire.HEADER_BYTES
        if not whole:  # case 3
            limit_waits(sock, receive_s=self._limits.message_timeout_s)
        raw = inbox.take(wire.HEADER_BYTES, deadline.remaining)
        header = wire.parse_header(raw)
        wire.check_request(header)
        writing = header.kind is wire.FrameKind.WRITE
        head_bytes = header.count * wire.ENTRY_BYTES + macs.tag_bytes
        missing = head_bytes + (header.payload_bytes + macs.tag_bytes if writing else 0) > inbox.num_bytes
        if missing and whole:  # case 2
            limit_waits(sock, receive_s=self._limits.message_timeout_s)
        table = inbox.take(header.count * wire.ENTRY_BYTES, deadline.remaining)
        macs.check([raw, table], inbox.take(macs.tag_bytes, deadline.remaining))
        ranges = wire.parse_table(header, table, self._memory.nbytes)
        views = [self._memory[offset : offset + length] for offset, length in ranges]
        limits = self._limits
        whole_s = limits.message_timeout_s + header.payload_bytes / limits.slowest_bytes_per_s
        in_time = BatchDeadline(whole_s).remaining  # each of its steps has the connection's own time limit
        if writing:
            receive(inbox, views, macs, in_time)
            reply = wire.pack_header(wire.Header(wire.FrameKind.WRITTEN, header.count, request_id=header.request_id))
            send_views(sock, [reply, macs.seal([reply])], in_time)
        else:
            data = wire.Header(wire.FrameKind.DATA, header.count, 0, header.payload_bytes, header.request_id)
            send(sock, wire.pack_header(data), views, macs, in_time)
        if missing or not whole:
            limit_waits(sock, receive_s=self._limits.idle_timeout_s)
        return True
