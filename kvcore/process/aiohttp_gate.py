"""aiohttp's HTTP/1.1, bounded as uvicorn's is by `http_protocol`: connections, a request's head, a client that takes
nothing; and a body, read whole.

Invariant: what is refused before a handler sees it is answered in the form of the nodes' API, as JSON.
"""

import asyncio
import http
import logging
import socket
import ssl
from typing import Any, cast

import msgspec
from aiohttp import StreamReader, web
from aiohttp.web_protocol import RequestHandler

from kvcore.errors import DeadlineExceededError, InvalidRequestError, OverloadedError, PayloadTooLargeError
from kvcore.peer_log import PeerLog
from kvcore.ports import base_url
from kvcore.process.http_body import check_encoding
from kvcore.process.http_gate import GatePlace, HttpGate, TlsListener
from kvcore.process.limits import HttpLimits

_logger = logging.getLogger("kvcore.aiohttp")


class BoundedRunner(web.AppRunner):
    """Serves an application whose connections pass a gate. Options as AppRunner's."""

    __slots__ = ("_log", "gate")

    def __init__(self, app: web.Application, limits: HttpLimits = HttpLimits(), **options: Any) -> None:
        super().__init__(app, **options)
        self.gate = HttpGate(limits)
        self._log = PeerLog(_logger)

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return _BoundedServer(server, self.gate, self._log)


class TlsSite(web.BaseSite):
    """Of such a runner, on a socket that listens: a connection has its place at the gate before it is encrypted."""

    __slots__ = ("_listener", "_tls")

    def __init__(self, runner: BoundedRunner, listener: socket.socket, tls: ssl.SSLContext) -> None:
        super().__init__(runner)
        self._listener, self._tls = listener, tls

    @property
    def name(self) -> str:
        """Its URL."""
        host, port = self._listener.getsockname()[:2]
        return base_url(host, port).replace("http", "https", 1)

    async def start(self) -> None:
        """As any site's."""
        await super().start()
        runner = cast(BoundedRunner, self._runner)
        self._server = TlsListener(runner.gate, self._listener, self._tls, cast(Any, runner.server))  # type: ignore[assignment]  # only closed


class _BoundedServer(web.Server):
    """The same server, which makes connections of ours."""

    def __init__(self, server: web.Server, gate: HttpGate, log: PeerLog) -> None:
        super().__init__(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            **server._kwargs,
        )
        self._gate = gate
        self._log = log

    def __call__(self) -> RequestHandler:
        return BoundedConnection(self, self._gate, self._log, loop=self._loop, **self._kwargs)


class BoundedConnection(RequestHandler):
    """One connection."""

    __slots__ = ("_gate", "_head_bytes", "_head_timer", "_log", "_payload", "_peer", "_send_timer", "place")

    def __init__(self, server: web.Server, gate: HttpGate, log: PeerLog, **options: Any) -> None:
        super().__init__(server, **options)
        self._gate = gate
        self._log = log
        self.place: GatePlace | None = None
        self._payload: StreamReader | None = None
        """Of the last request whose head came."""
        self._peer: str | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected: its first head must come in time."""
        made = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else None
        super().connection_made(transport)
        self.place = self._gate.admit(self._peer, made.abort, self.place)
        if self.place is None:
            made.abort()
            return
        limits = self._gate.limits
        self._start_head(limits.head_s if self.place.why_spare is None else min(limits.spare_head_s, limits.head_s))

    def connection_lost(self, exc: BaseException | None) -> None:
        """No timer outlives the connection."""
        self._head_is_over()
        self._stop_send_timer()
        if self.place is not None:
            self.place.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As aiohttp's; a head is bounded from its first byte to its last."""
        heads, in_body = self._request_count, self._payload is not None and not self._payload.is_eof()
        super().data_received(data)
        if self._request_count > heads:
            self._head_is_over()
            self._payload = self._messages[-1][1] if self._messages else None
        elif data and not in_body:
            limits = self._gate.limits
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._start_head(limits.head_s)
            if self._head_bytes > limits.max_head_bytes:
                self._refuse(431, "head_too_large", f"the head is over the bound of {limits.max_head_bytes} bytes")

    def pause_writing(self) -> None:
        """The client does not take what is sent."""
        super().pause_writing()
        if self._send_timer is None:
            self._send_timer = self._loop.call_later(self._gate.limits.send_s, self._send_late)

    def resume_writing(self) -> None:
        """It does again."""
        self._stop_send_timer()
        super().resume_writing()

    def refusal(self, request: web.BaseRequest) -> tuple[int, str] | None:
        """The status and reason for which this request is not served; None: it is. Counts and logs it."""
        limits = self._gate.limits
        size = sum(len(name) + len(value) + 4 for name, value in request.raw_headers) + len(request.raw_path)
        if size > limits.max_head_bytes:
            text = f"the head is over the bound of {limits.max_head_bytes} bytes"
            self.count(431, "head_too_large", text)
            return 431, text
        if self.place is not None and not self.place.serves(request.method, request.path):
            self.count(503, None, self.place.why_spare or "")
            return 503, f"{self.place.why_spare}; come back later"
        return None

    def count(self, status: int | None, reason: str | None, message: str) -> None:
        """For the metrics, unless the gate has counted it, and for the log."""
        if reason is not None:
            self._gate.refused[reason] += 1
        level = logging.WARNING if status in (None, 503) else logging.INFO
        self._log.say(level, "refused", reason or "connections", self._peer, status=status, reason=message)

    def _start_head(self, seconds: float) -> None:
        self._head_timer = self._loop.call_later(seconds, self._head_late)

    def _head_is_over(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse(408, "head_late", f"the head did not arrive within {self._gate.limits.head_s:g} s")
        else:
            self.force_close()

    def _send_late(self) -> None:
        self._send_timer = None
        self.count(None, "send_late", f"the client took nothing for {self._gate.limits.send_s:g} s")
        if self.transport is not None:
            self.transport.abort()

    def _refuse(self, status: int, reason: str, message: str) -> None:
        self.count(status, reason, message)
        self._head_is_over()
        if self.transport is not None:
            body = msgspec.json.encode({"error": {"code": "malformed_http", "message": message, "retryable": False}})
            head = (
                f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.force_close()


def connection_of(request: web.BaseRequest) -> BoundedConnection:
    """The request's connection, which a BoundedRunner made."""
    connection = request.protocol
    assert isinstance(connection, BoundedConnection)
    return connection


async def read_body(http: web.Request, most: int, seconds: float) -> bytes:
    """The whole body, of at most `most` bytes, within `seconds`. What has come of it counts at the listener's gate.

    Raises MediaTypeError, PayloadTooLargeError, OverloadedError, DeadlineExceededError, InvalidRequestError.
    """
    check_encoding(http.headers)
    connection, body = connection_of(http), bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in http.content.iter_any():
                body += part
                if len(body) > most:
                    raise PayloadTooLargeError(f"the body has more than {most} bytes")
                if not http.content.is_eof():
                    _hold(connection, len(part))
    except web.RequestPayloadError as error:
        raise InvalidRequestError("the body is not coded as its head says") from error
    except TimeoutError as error:
        raise DeadlineExceededError("the node did not finish in time") from error
    finally:
        if connection.place is not None:
            connection.place.let_go()
    return bytes(body)


def check_place(http: web.Request) -> web.Response | None:
    """The answer of a request that its connection may not ask, in JSON; None: it may."""
    refused = connection_of(http).refusal(http)
    if refused is None:
        return None
    status, text = refused
    body = {"error": {"code": OverloadedError.code if status == 503 else "malformed_http", "message": text}}
    response = web.json_response(body, status=status, headers={"Retry-After": "1"} if status == 503 else None)
    response.force_close()
    return response


def _hold(connection: BoundedConnection, num_bytes: int) -> None:
    if connection.place is not None and (why := connection.place.hold(num_bytes)) is not None:
        connection.count(503, "bodies", why)
        raise OverloadedError(f"{why}; come back later")
