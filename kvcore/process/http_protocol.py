"""uvicorn's HTTP/1.1, bounded: a request's head and body have a size and a time, and what is not HTTP gets a proper
error body.

Owns what happens before an application sees a request. Invariants: a connection that has sent no whole head is closed
after `head_s`, one whose body is not whole after `body_s`, one that takes nothing of its answer after `send_s`; nothing
is written into the middle of an answer. A wish for another protocol (`Upgrade`, which Java's client sends with its
requests) is ignored, as HTTP allows: the request is answered as any other.
"""

import asyncio
import http
import logging
from typing import Any

import httptools
import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kvcore.peer_log import PeerLog
from kvcore.process.certified_app import PEER_NAMES
from kvcore.process.http_exchange import HttpExchange
from kvcore.process.http_gate import GatePlace, HttpGate
from kvcore.trust.certificates import PeerNames, peer_names

_logger = logging.getLogger("kvcore.asgi")


class BoundedHttp(HttpToolsProtocol):
    """One connection. Answers in OpenAI's error form, which the metadata server's is too."""

    def __init__(self, *uvicorns: Any, gate: HttpGate | None = None, log: PeerLog | None = None, **own: Any) -> None:
        """`gate` and `log` are the listener's; None: the connection is the only one."""
        super().__init__(*uvicorns, **own)
        self._gate = gate or HttpGate()
        self._limits = self._gate.limits
        self._log = log or PeerLog(_logger)
        self.place: GatePlace | None = None
        """Whoever accepted the connection may have taken it one."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        """Of a head whose end has not come."""
        self._read_bytes = 0
        """At once, last."""
        self._new_bytes = 0
        """Of a body, not counted at the gate yet."""
        self._in_head = False
        self._in_message = False
        self._peer_names: PeerNames | None = None
        self._answered: RequestResponseCycle | None = None
        """The request that the application has now, or had last."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client has connected: its first head must come in time."""
        super().connection_made(transport)
        self._peer_names = peer_names(transport)
        self.place = self._gate.admit(self.client[0] if self.client else None, transport.abort, self.place)
        if self.place is None:
            transport.abort()
            return
        head_s = self._limits.head_s if self.place.why_spare is None else self._limits.spare_head_s
        self._head_timer = self.loop.call_later(min(head_s, self._limits.head_s), self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives the connection."""
        self._head_is_over()
        self._body_is_over()
        self._stop_send_timer()
        if self.place is not None:
            self.place.leave()
        if isinstance(self._answered, HttpExchange):
            self._answered.gone()  # uvicorn tells only the last one of those that are pipelined
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not take what is sent."""
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self.loop.call_later(self._limits.send_s, self._send_late)

    def resume_writing(self) -> None:
        """It does again."""
        self._stop_send_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        """As uvicorn's. A connection that is to close must not wait for a client that takes nothing."""
        super().on_response_complete()
        if self.transport.is_closing() and self._send_timer is None:
            self._send_timer = self.loop.call_later(self._limits.send_s, self._send_late)

    def on_message_begin(self) -> None:
        """The first byte of a request. As uvicorn's, but for the scope, which its HttpExchange makes."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._in_head = self._in_message = True

    def on_headers_complete(self) -> None:
        """From here on the application bounds the request."""
        too_large = self._is_too_large()
        self._head_is_over()
        if self.transport.is_closing():
            return
        exchange = HttpExchange(self)
        scope = self.scope = exchange.scope
        if self._peer_names is not None:
            scope[PEER_NAMES] = self._peer_names  # type: ignore[literal-required]
        app = self.app
        if too_large:
            app = self._head_too_large
        elif self.place is not None and self.place.why_spare is not None:
            exchange.keep_alive = False
            if not self.place.serves(scope["method"], scope["path"]):
                app = self._overloaded  # its body is read as any other's
        under_way, self.cycle = self.cycle, exchange
        if under_way is None or under_way.response_complete:
            self._start_asgi_task(exchange, app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, app))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """As uvicorn's. Requests that are pipelined wait for their turn, so there is one at a time."""
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """A part of a request's body. Once the connection is given up nobody wants the rest."""
        if not self.transport.is_closing():
            self._new_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request; but the parser stops at the head of one that wishes for another protocol."""
        if self.parser.should_upgrade():
            return
        self._in_message = False
        self._body_is_over()
        if not self.transport.is_closing():
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but for the parser that stops after a head with `Upgrade`: another reads on from there."""
        self._unset_keepalive_if_required()
        self._read_bytes = len(data)
        rest: bytes | None = data
        try:
            while rest is not None:
                rest = self._parse(rest)
        except httptools.HttpParserError:
            self._refuse(400, "malformed", "this is not an HTTP/1.1 request")
            return
        if self._in_head:  # only then: most heads come whole, and a timer costs as much as reading one
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(self._limits.head_s, self._head_late)
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.max_head_bytes:
                self._refuse(431, "head_too_large", self._head_bound)
        elif self._in_message:
            self._hold_body()

    def eof_received(self) -> None:
        """The client sends no more. If that cuts a request short it gets an error, in case it still reads."""
        if self._in_message:
            self._refuse(400, "malformed", "the request was cut short")

    def _parse(self, data: bytes) -> bytes | None:
        """What is left of it after a head with `Upgrade`; None: nothing."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            version = self.parser.get_http_version()
            self.parser = httptools.HttpRequestParser(_AfterHead(self))
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(_framing(self.headers, version))
            return data[stopped.args[0] :]
        return None

    def _hold_body(self) -> None:
        """More of the body is to come: what there is counts at the gate, and time runs."""
        if self.transport.is_closing() or self.place is None:
            return
        if self._body_timer is None:
            self._body_timer = self.loop.call_later(self._limits.body_s, self._body_late)
        new, self._new_bytes = self._new_bytes, 0
        if new and (why := self.place.hold(new)) is not None:
            self._refuse(503, "bodies", f"{why}; come back later")

    @property
    def _head_bound(self) -> str:
        return f"the request's head is over the bound of {self._limits.max_head_bytes} bytes"

    async def _head_too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._count(431, "head_too_large", self._head_bound)
        await _say(send, 431, self._head_bound)

    async def _overloaded(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = self.place.why_spare if self.place is not None else None
        self._count(503, None, reason or "")
        await _say(send, 503, f"{reason}; come back later")

    def _is_too_large(self) -> bool:
        """Whether the head that is whole now is. One that came in one piece could not be refused before."""
        most = self._limits.max_head_bytes
        if self._head_bytes + self._read_bytes <= most:
            return False
        return len(self.url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers) > most

    def _head_is_over(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _body_is_over(self) -> None:
        self._new_bytes = 0
        if self.place is not None:
            self.place.let_go()
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self._in_head:
            self._refuse(408, "head_late", f"the request's head did not arrive within {self._limits.head_s:g} s")
        else:
            self.transport.close()

    def _body_late(self) -> None:
        self._body_timer = None
        if self.pipeline:  # it waits for its turn, and is not read meanwhile
            self._body_timer = self.loop.call_later(self._limits.body_s, self._body_late)
            return
        self._refuse(408, "body_late", f"the request's body did not arrive within {self._limits.body_s:g} s")

    def _send_late(self) -> None:
        self._send_timer = None
        self._count(None, "send_late", f"the client took nothing for {self._limits.send_s:g} s")
        self.transport.abort()

    def _refuse(self, status: int, reason: str, message: str) -> None:
        """Answer, unless an answer is being written, and close."""
        if self.transport.is_closing():
            return
        self._count(status, reason, message)
        if self._may_answer():
            self.transport.write(_answer(status, message))
        for exchange in (self._answered, self.cycle):
            if isinstance(exchange, HttpExchange):
                exchange.flush()
                exchange.gone()  # the application must not answer a second time
        self._body_is_over()
        self.transport.close()

    def _count(self, status: int | None, reason: str | None, message: str) -> None:
        """For the metrics, unless the gate has counted it, and for the log."""
        if reason is not None:
            self._gate.refused[reason] += 1
        peer = self.client[0] if self.client else None
        level = logging.WARNING if status in (None, 503) else logging.INFO
        self._log.say(level, "refused", reason or "connections", peer, status=status, reason=message)

    def _may_answer(self) -> bool:
        cycle = self.cycle
        if cycle is None:
            return True
        if self._in_message and not self._in_head:  # the cycle's own body is still coming
            return not cycle.response_started and not self.pipeline
        return cycle.response_complete


class _AfterHead:
    """What a connection hears of a parser that begins with a head which is known: nothing of that head."""

    def __init__(self, connection: BoundedHttp) -> None:
        self._connection = connection
        self._known = True
        self.on_body = connection.on_body
        self.on_message_complete = connection.on_message_complete

    def on_message_begin(self) -> None:
        if not self._known:
            self._connection.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._known:
            self._connection.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._known:
            self._connection.on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._known:
            self._known = False
        else:
            self._connection.on_headers_complete()


def _framing(headers: list[tuple[bytes, bytes]], version: str) -> bytes:
    """A head with which a parser finds the end of the message that these headers begin."""
    lines = [b"POST / HTTP/%s" % version.encode()]
    lines += [name + b": " + value for name, value in headers if name in (b"content-length", b"transfer-encoding")]
    return b"\r\n".join([*lines, b"", b""])


_KINDS = {503: ("server_error", "overloaded")}


def _body_of(status: int, message: str) -> bytes:
    kind, code = _KINDS.get(status, ("invalid_request_error", "malformed_http"))
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _headers_of(status: int, body: bytes) -> list[tuple[bytes, bytes]]:
    retry = [(b"retry-after", b"1")] if status == 503 else []
    length = (b"content-length", str(len(body)).encode())
    return [(b"content-type", b"application/json"), length, *retry, (b"connection", b"close")]


async def _say(send: Send, status: int, message: str) -> None:
    """As an application does."""
    body = _body_of(status, message)
    await send({"type": "http.response.start", "status": status, "headers": _headers_of(status, body)})
    await send({"type": "http.response.body", "body": body})


def _answer(status: int, message: str) -> bytes:
    """The same, as bytes."""
    body = _body_of(status, message)
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}".encode()]
    return b"\r\n".join([*lines, *(name + b": " + value for name, value in _headers_of(status, body)), b"", body])
