"""uvicorn's HTTP/1.1, bounded: a request's head has a size and a time, and what is not HTTP gets a proper error body.

Owns what happens before an application sees a request. Invariant: a connection that has sent no whole head is closed
after `head_s`; nothing is written into the middle of an answer. A wish for another protocol (`Upgrade`, which Java's
client sends with its requests) is ignored, as HTTP allows: the request is answered as any other.
"""

import asyncio
import http
import logging
from typing import Any

import httptools
import msgspec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvcore.process.descriptors import RESERVED, soft_limit
from kvcore.process.limits import HttpLimits
from kvcore.telemetry import log_fields

MAX_HEAD_BYTES = 64 << 10

_logger = logging.getLogger("kvcore.asgi")


class BoundedHttp(HttpToolsProtocol):
    """One connection. Answers in OpenAI's error form, which the metadata server's is too."""

    def __init__(self, *uvicorns: Any, limits: HttpLimits = HttpLimits(), **own: Any) -> None:
        super().__init__(*uvicorns, **own)
        self._head_s = limits.head_s
        self._max_connections = limits.max_connections or max(1, soft_limit() - RESERVED)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = False
        self._in_message = False
        self._too_many = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client has connected: its first head must come in time."""
        super().connection_made(transport)
        self._too_many = len(self.connections) > self._max_connections  # those before it are served all the same
        self._head_timer = self.loop.call_later(self._head_s, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """No timer outlives the connection."""
        self._head_is_over()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head = self._in_message = True

    def on_headers_complete(self) -> None:
        """From here on the application bounds the request."""
        self._head_is_over()
        app = self.app
        if self._too_many:
            self.app = self._overloaded  # its body is read as any other's
        super().on_headers_complete()
        self.app = app

    def on_message_complete(self) -> None:
        """The last byte of a request; but the parser stops at the head of one that wishes for another protocol."""
        if self.parser.should_upgrade():
            return
        self._in_message = False
        super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but for the parser that stops after a head with `Upgrade`: another reads on from there."""
        self._unset_keepalive_if_required()
        rest: bytes | None = data
        try:
            while rest is not None:
                rest = self._parse(rest)
        except httptools.HttpParserError:
            self._refuse(400, "this is not an HTTP/1.1 request")
            return
        if self._in_head:  # only then: most heads come whole, and a timer costs as much as reading one
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(self._head_s, self._head_late)
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the request's head is over the bound of {MAX_HEAD_BYTES} bytes")

    def eof_received(self) -> None:
        """The client sends no more. If that cuts a request short it gets an error, in case it still reads."""
        if self._in_message:
            self._refuse(400, "the request was cut short")

    def _parse(self, data: bytes) -> bytes | None:
        """What is left of it after a head with `Upgrade`; None: nothing."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self.parser = httptools.HttpRequestParser(_AfterHead(self))
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(_framing(self.headers, self.scope.get("http_version", "1.1")))
            return data[stopped.args[0] :]
        return None

    async def _overloaded(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer = f"{self.client[0]}:{self.client[1]}" if self.client else None
        reason = f"this process takes {self._max_connections} connections at a time"
        log_fields(_logger, logging.WARNING, "refused", status=503, reason=reason, peer=peer)
        error = {"message": f"{reason}; come back later", "type": "server_error", "param": None, "code": "overloaded"}
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"connection", b"close")]
        body = msgspec.json.encode({"error": error})
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _head_is_over(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self._in_head:
            self._refuse(408, f"the request's head did not arrive within {self._head_s:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer is being written, and close."""
        if self.transport.is_closing():
            return
        peer = f"{self.client[0]}:{self.client[1]}" if self.client else None
        log_fields(_logger, logging.INFO, "refused", status=status, reason=message, peer=peer)
        if self._may_answer():
            self.transport.write(_answer(status, message))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application must not answer a second time
            self.cycle.message_event.set()
        self.transport.close()

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


def _answer(status: int, message: str) -> bytes:
    phrase = http.HTTPStatus(status).phrase
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "malformed_http"}
    body = msgspec.json.encode({"error": error})
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
