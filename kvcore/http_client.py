"""A small HTTP/1.1 client for calls between our own processes: kept-alive connections, msgpack, streamed answers.

Owns its connections: one is used again only after its answer was read to the end. It follows no redirect, speaks no
TLS and takes no answer without a length. About a quarter of the processor time of a general client: what is left of a
call to a metadata server or node is mostly the kernel's.
"""

import asyncio
import functools
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast
from urllib.parse import urlsplit

import httptools

_HIGH_WATER_BYTES = 1 << 20
"""An answer that is read slower than it comes is not taken from the socket beyond this."""
_PATH = re.compile(r"/[!-~]*")
_Address = tuple[str, int]


class HttpError(ConnectionError):
    """The server did not answer, broke off, or does not speak HTTP/1.1 as we know it."""


class HttpResponse:
    """One answer under way. Has one reader, inside of the `async with` that gave it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.status = 0
        self.complete = False
        """Whether the answer has arrived to its end."""
        self._transport = transport
        self._parts: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._error: HttpError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read_some(self) -> bytes:
        """What has arrived, at least one byte; empty at the end. Raises HttpError where the server broke off."""
        while not self._parts:
            if self.complete:
                return b""
            await self._news()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._buffered = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def read(self, limit_bytes: int) -> bytes:
        """The rest of it. Raises HttpError where it is longer than `limit_bytes` or broken off."""
        parts: list[bytes] = []
        size = 0
        while part := await self.read_some():
            parts.append(part)
            size += len(part)
            if size > limit_bytes:
                raise HttpError(f"the answer has more than {limit_bytes} bytes")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def head(self) -> None:
        """Until the status is known."""
        while not self.status:
            await self._news()

    def take(self, part: bytes) -> None:
        """The connection's side: a part of the body."""
        self._parts.append(part)
        self._buffered += len(part)
        if self._buffered > _HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self.wake()

    def fail(self, error: HttpError) -> None:
        """The connection's side: nothing more will come. What has come can still be read."""
        if not self.complete:
            self._error = self._error or error
            self.wake()

    def wake(self) -> None:
        """The connection's side: something has changed."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _news(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class _Connection(asyncio.Protocol):
    """One connection, and the parser's callbacks (`on_*`)."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self.idle_since = 0.0
        self._response: HttpResponse | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._keep = True

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent."""
        return self._keep and not self.lost and self._response is not None and self._response.complete

    async def exchange(self, head: bytes, body: bytes) -> HttpResponse:
        """Send a request; its answer, once the status is known. Raises HttpError."""
        assert self.transport is not None
        self._response = response = HttpResponse(self.transport)
        if self.lost:
            raise HttpError("the connection was closed")
        self.transport.write(head + body)
        await response.head()
        return response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio.Protocol. uvloop's transports are of no class of asyncio's."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio.Protocol."""
        self.lost = True
        if self._response is not None:
            self._response.fail(HttpError(f"the connection broke off{f': {exc}' if exc else ''}"))

    def data_received(self, data: bytes) -> None:
        """As asyncio.Protocol."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._refuse(f"what came is not HTTP/1.1: {error}")

    def on_message_begin(self) -> None:
        """An answer begins; one that nobody asked for ends the connection."""
        if self._response is None or self._response.status:
            self._refuse("an answer that nobody asked for")

    def on_headers_complete(self) -> None:
        """The status is known."""
        status = self._parser.get_status_code()
        if status < 200:
            self._refuse(f"status {status}")
        elif self._response is not None:
            self._response.status = status
            self._response.wake()

    def on_body(self, part: bytes) -> None:
        """A part of the body, chunk framing taken off."""
        if self._response is not None:
            self._response.take(part)

    def on_message_complete(self) -> None:
        """The answer's end."""
        self._keep &= self._parser.should_keep_alive()
        if self._response is not None and self._response.status:
            self._response.complete = True
            self._response.wake()

    def _refuse(self, what: str) -> None:
        self._keep = False
        if self._response is not None:
            self._response.fail(HttpError(what))
        if self.transport is not None:
            self.transport.abort()


class HttpClient:
    """Requests to any number of servers. Used and closed on one event loop; deadlines are the caller's."""

    def __init__(self, *, max_connections: int, connect_timeout_s: float, idle_s: float) -> None:
        """A request beyond `max_connections` under way waits. A connection idle for `idle_s` is not used again: choose
        less than the servers' own, or a request meets one that is being closed."""
        self._slots = asyncio.Semaphore(max_connections)
        self._connect_timeout_s = connect_timeout_s
        self._idle_s = idle_s
        self._open: set[_Connection] = set()
        self._idle: dict[_Address, list[_Connection]] = {}
        self._closed = False

    @asynccontextmanager
    async def request(self, method: str, origin: str, path: str, body: bytes = b"") -> AsyncIterator[HttpResponse]:
        """The answer of `origin` (`http://host:port`), once its status is known; `path` is quoted already.

        Raises OSError (HttpError, and what connecting raises, TimeoutError included), here and from the answer's
        reads. Left before the answer's end, or cancelled: the connection is cut. Never sends a request twice.
        """
        address = _address(origin)
        head = _head(method, address, path, len(body))
        async with self._slots:
            connection = self._take_idle(address) or await self._connect(address)
            try:
                yield await connection.exchange(head, body)
            finally:
                self._put_back(address, connection)

    async def aclose(self) -> None:
        """Cut every connection; requests under way fail. Idempotent."""
        self._closed = True
        self._idle.clear()
        for connection in self._open:
            if connection.transport is not None:
                connection.transport.abort()
        self._open.clear()
        await asyncio.sleep(0)  # lets the transports let go of their sockets

    def _take_idle(self, address: _Address) -> _Connection | None:
        """The one used last, so that the others grow old and go. Old ones are closed on the way."""
        idle, oldest = self._idle.get(address), asyncio.get_running_loop().time() - self._idle_s
        while idle:
            connection = idle.pop()
            if not connection.lost and connection.idle_since >= oldest:
                return connection
            self._cut(connection)
        return None

    async def _connect(self, address: _Address) -> _Connection:
        if self._closed:
            raise HttpError("the client is closed")
        for key, idle in list(self._idle.items()):  # servers that are gone leave nothing behind
            for lost in [one for one in idle if one.lost]:
                idle.remove(lost)
                self._cut(lost)
            if not idle:
                del self._idle[key]
        host, port = address
        async with asyncio.timeout(self._connect_timeout_s):
            _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port)
        self._open.add(connection)
        return connection

    def _put_back(self, address: _Address, connection: _Connection) -> None:
        if self._closed or not connection.reusable:
            self._cut(connection)
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.setdefault(address, []).append(connection)

    def _cut(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection.transport is not None:
            connection.transport.abort()


@functools.lru_cache(256)
def _address(origin: str) -> _Address:
    parts = urlsplit(origin)
    try:
        if parts.scheme == "http" and parts.hostname and parts.path in {"", "/"} and not parts.query:
            return parts.hostname, parts.port or 80
    except ValueError:  # the port is no port
        pass
    raise HttpError(f"{origin!r} is not of the form http://host:port")


def _head(method: str, address: _Address, path: str, body_bytes: int) -> bytes:
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is no quoted path")
    host, port = address
    return (
        f"{method} {path} HTTP/1.1\r\nHost: {f'[{host}]' if ':' in host else host}:{port}\r\n"
        f"Accept: application/msgpack\r\nContent-Type: application/msgpack\r\nContent-Length: {body_bytes}\r\n\r\n"
    ).encode("ascii")
