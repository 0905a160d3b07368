"""One request of uvicorn's HTTP/1.1 and its answer: written once a turn of the event loop, and told when the client has
left.

Owns the bytes of an answer from the application's messages to the transport. What is sent within one turn leaves as
one write: head and body together, and as many tokens of a stream as came at once.
"""

import asyncio
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from urllib.parse import unquote

from httptools import parse_url
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

EXCHANGE = "kvferry.exchange"
"""Among a request's `extensions`: its HttpExchange."""
MAX_HELD_BYTES = 64 << 10
"""More is written before the turn ends."""
Headers = Sequence[tuple[bytes, bytes]]
"""Their names in lower case."""


class HttpExchange(RequestResponseCycle):
    """uvicorn's cycle with another way to write."""

    def __init__(self, connection: HttpToolsProtocol) -> None:
        """Of the request whose head is whole now. Makes its scope, as uvicorn does."""
        parser = connection.parser
        version, url = parser.get_http_version(), parse_url(connection.url)
        path = url.path.decode("ascii")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": connection.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": connection.server,
            "client": connection.client,
            "scheme": connection.scheme,
            "root_path": connection.root_path,
            "headers": connection.headers,
            "state": connection.app_state.copy(),
            "method": parser.get_method().decode("ascii"),
            "path": connection.root_path + (unquote(path) if "%" in path else path),
            "raw_path": connection.root_path.encode("ascii") + url.path,
            "query_string": url.query or b"",
            "extensions": {EXCHANGE: self},
        }
        super().__init__(
            scope,  # type: ignore[arg-type]  # uvicorn's own type of the same
            connection.transport,
            connection.flow,
            connection.logger,
            connection.access_logger,
            False,
            connection.server_state.default_headers,
            asyncio.Event(),
            connection.expect_100_continue,
            version != "1.0" and parser.should_keep_alive(),
            connection.on_response_complete,
        )
        self._loop = connection.loop
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._on_gone: Callable[[], object] | None = None
        self.on_head: tuple[Callable[[int], Headers], ...] = ()
        """Called with the answer's status: what its head says beside the application's headers."""

    def on_gone(self, call: Callable[[], object] | None) -> None:
        """Call this, once, when the client leaves; at once if it has left. None: nobody wants to know any more."""
        self._on_gone = call
        if self.disconnected:
            self.gone()

    def gone(self) -> None:
        """The client has left, or is not answered any more. Idempotent."""
        if self.response_complete:
            return
        self.disconnected = True
        self.message_event.set()
        call, self._on_gone = self._on_gone, None
        if call is not None:
            call()

    def take_body(self) -> bytes | None:
        """The request's body where all of it is there, once. None: it is to be received as ASGI has it."""
        if self.more_body or self.disconnected:
            return None
        self.flow.resume_reading()  # or nobody would see that the client leaves
        body, self.body = self.body, bytearray()
        self.message_event.clear()
        return bytes(body)

    async def ready(self) -> None:
        """Waits while the client takes nothing."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()

    async def send(self, message: Message) -> None:  # type: ignore[override]  # uvicorn's own types of the same
        """An application's message. Waits while the client takes nothing."""
        await self.ready()
        if self.disconnected:
            return
        kind = message["type"]
        if kind == "http.response.body" and self.response_started and not self.response_complete:
            self._add(message.get("body", b""), more=message.get("more_body", False))
        elif kind == "http.response.start" and not self.response_started:
            self.start(message["status"], message.get("headers", ()))
        else:
            raise RuntimeError(f"{kind!r} does not belong at this place of an answer")

    @property
    def flows(self) -> bool:
        """Whether `ready` would not wait."""
        return not self.flow.write_paused

    @property
    def takes(self) -> bool:
        """Whether `write` may be called: a body is under way, and the client takes what is sent."""
        under_way = self.response_started and not self.response_complete
        return under_way and not (self.disconnected or self.flow.write_paused)

    def start(self, status: int, headers: Headers) -> None:
        """The head of the answer: as by `send`, where that would not wait. So with the next three."""
        if self.disconnected:
            return
        self._hold(self._head(status, headers))

    def write(self, body: bytes) -> None:
        """A part of a body that is not the last. See `takes`."""
        if self.chunked_encoding:
            if body:
                self._hold(b"%x\r\n%b\r\n" % (len(body), body))
        else:
            self._add(body, more=True)

    def end(self, body: bytes) -> None:
        """The last part of a body."""
        if self.disconnected:
            return
        self._add(body, more=False)

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """All of an answer, in one write. `headers`: but its length."""
        if self.disconnected:
            return
        head = self._head(status, [(b"content-length", b"%d" % len(body)), *headers])
        if self.scope["method"] != "HEAD":
            head += body
        self._held.append(head)
        self.expected_content_length = 0
        self._end()

    def flush(self) -> None:
        """Write what this turn has brought."""
        if not self._held:
            return
        data = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        if not self.disconnected and not self.transport.is_closing():
            self.transport.write(data)

    def _head(self, status: int, headers: Headers) -> bytes:
        self.response_started, self.waiting_for_100_continue = True, False
        content = [STATUS_LINE[status]]
        headers = [*self.default_headers, *headers]
        for says in self.on_head:
            headers += says(status)
        for given, value in headers:
            if HEADER_RE.search(given) or HEADER_VALUE_RE.search(value):
                raise RuntimeError(f"header {given!r} has a character that ends it")
            name = given.lower()
            if name == b"content-length" and self.chunked_encoding is None:
                self.expected_content_length, self.chunked_encoding = int(value), False
            elif name == b"transfer-encoding" and value.lower() == b"chunked":
                self.expected_content_length, self.chunked_encoding = 0, True
            elif name == b"connection":
                if b"close" in [token.strip() for token in value.lower().split(b",")]:
                    self.keep_alive = False
                if not self.keep_alive:
                    continue
            content += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            content.append(b"connection: close\r\n")
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in (204, 304):
            self.chunked_encoding = True
            content.append(b"transfer-encoding: chunked\r\n")
        content.append(b"\r\n")
        return b"".join(content)

    def _add(self, body: bytes, *, more: bool) -> None:
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
        elif self.chunked_encoding:
            self.write(body)
            if not more:
                self._hold(b"0\r\n\r\n")
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0:
                raise RuntimeError("the body is longer than its content-length")
            if body:
                self._hold(body)
        if not more:
            self._end()

    def _end(self) -> None:
        self.flush()
        if self.expected_content_length:
            raise RuntimeError("the body is shorter than its content-length")
        self.response_complete, self._on_gone, self.on_head = True, None, ()
        self.scope["extensions"].pop(EXCHANGE, None)  # it holds this, which holds it
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def _hold(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > MAX_HELD_BYTES:
            self.flush()


def exchange_of(scope: Scope) -> HttpExchange | None:
    """None: another server has the connection."""
    found = scope.get("extensions", {}).get(EXCHANGE)
    return found if isinstance(found, HttpExchange) else None


def straight(scope: Scope, send: Send) -> HttpExchange | None:
    """The exchange of a request to whose answer nothing is done behind the application: what would be sent by `send`
    may be written. None: it must be sent."""
    exchange = exchange_of(scope)
    return exchange if exchange is not None and send == exchange.send else None


def told_when_gone(
    scope: Scope, receive: Receive, leave: Callable[[], object]
) -> AbstractContextManager[None, bool | None]:
    """Calls `leave` when the client leaves while the block runs. The request's body has been read."""
    exchange = exchange_of(scope)
    return _told_by_message(receive, leave) if exchange is None else _ToldByExchange(exchange, leave)


class _ToldByExchange:
    def __init__(self, exchange: HttpExchange, leave: Callable[[], object]) -> None:
        self._exchange, self._leave = exchange, leave

    def __enter__(self) -> None:
        self._exchange.on_gone(self._leave)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exchange.on_gone(None)


@contextmanager
def _told_by_message(receive: Receive, leave: Callable[[], object]) -> Generator[None]:
    watch = asyncio.ensure_future(_until_gone(receive))

    def ended(_: "asyncio.Future[None]") -> None:
        if not watch.cancelled():
            watch.exception()  # whatever ended it: nothing comes of this client any more
            leave()

    watch.add_done_callback(ended)
    try:
        yield
    finally:
        watch.remove_done_callback(ended)
        watch.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
