"""`GET | PUT | DELETE /metadata?key=` over a MooncakeDialect, in the words of Mooncake's own servers. Plain ASGI.

Those words are text, not our error bodies: Mooncake's clients write the text of any answer that is not 200 into their
log. The framework would take longer than the rest of a call.
"""

import asyncio
import base64
import hmac
import logging
from collections.abc import Callable, Iterable

from starlette.types import Message, Receive, Scope, Send

from kvcore.clock import Clock
from kvcore.errors import BodyLateError, KVFerryError, MediaTypeError, PayloadTooLargeError
from kvcore.process.http_body import body_at_hand
from kvcore.telemetry import log_fields
from metadata_server.mooncake.dialect import MooncakeDialect
from metadata_server.mooncake.keys import key_of
from metadata_server.mooncake.limits import DialectLimits

PATH = "/metadata"
_Header = tuple[bytes, bytes]
_JSON: _Header = (b"content-type", b"application/json")
_TEXT: _Header = (b"content-type", b"text/plain; charset=utf-8")
_CHALLENGE: _Header = (b"www-authenticate", b'Bearer realm="metadata", Basic realm="metadata"')
_CODINGS = (b"content-encoding", b"transfer-encoding")
_ALLOW: _Header = (b"allow", b"GET, PUT, DELETE")
_logger = logging.getLogger("metadata_server")


class MooncakeApp:
    """ASGI: whatever its path is, it is taken for `/metadata`."""

    def __init__(
        self,
        dialect: MooncakeDialect,
        clock: Clock,
        observe: Callable[[float], None] = lambda _: None,
        token: str | None = None,
        limits: DialectLimits = DialectLimits(),
    ) -> None:
        """`token`: callers must bring it. `observe`: takes the seconds of each call."""
        self._dialect = dialect
        self._clock = clock
        self._observe = observe
        self._token = None if token is None else token.encode()
        self._body_s = limits.body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        started = self._clock.now()
        try:
            if self._token is not None and not _brings(scope["headers"], self._token):
                await _say(send, 401, b"a token is needed", _CHALLENGE)
            else:
                await self._answer(scope, receive, send)
        except KVFerryError as error:
            await _say(send, error.http_status, error.message.encode())
        except Exception as error:  # request boundary
            log_fields(_logger, logging.ERROR, "request_failed", path=PATH, error=repr(error))
            await _say(send, 500, b"internal error; see the log")
        self._observe(self._clock.now() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, key = scope["method"], key_of(scope["query_string"])
        if method not in ("GET", "PUT", "DELETE"):
            await _say(send, 405, b"Method not allowed", _ALLOW)
        elif not key:
            await _say(send, 400, b"Missing key parameter")
        elif method == "GET":
            value = await self._dialect.get(key)
            if value is None:
                await _say(send, 404, b"metadata not found")
            else:
                await _send(send, 200, value, (_JSON,))
        elif method == "DELETE":
            done = await self._dialect.delete(key)
            await (_say(send, 200, b"metadata deleted") if done else _say(send, 404, b"metadata not found"))
        else:
            body = await self._read(scope, receive)
            if body is None:
                return  # nobody reads an answer
            held = await self._dialect.put(key, body)
            if held is None:
                for message in _UPDATED:
                    await send(message)
            else:
                await _say(send, 400, f"Duplicate rpc_meta key not allowed: {held.why}".encode())

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, bounded in size and time; None: the client has left."""
        for name, value in scope["headers"]:
            if name in _CODINGS and value.strip().lower() not in (b"", b"identity", b"chunked"):
                raise MediaTypeError("a packed value is not read here: send it as it is")
            if name == b"content-length" and value.isdigit():
                self._check_size(int(value[:20]))
        if (whole := await body_at_hand(scope, receive)) is not None:
            self._check_size(len(whole))
            return whole
        body: bytes = b""
        try:
            async with asyncio.timeout(self._body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._check_size(len(body))
                    if not message.get("more_body", False):
                        return body
        except TimeoutError as error:
            raise BodyLateError(f"the value did not arrive within {self._body_s:g} s") from error

    def _check_size(self, size: int) -> None:
        if size > self._dialect.max_value:
            raise PayloadTooLargeError(f"metadata value: {size} bytes; at most {self._dialect.max_value} are taken")


class MooncakePort:
    """ASGI for a port of the dialect's own: `/metadata`, and `/health` as Mooncake's servers answer it."""

    def __init__(self, metadata: MooncakeApp) -> None:
        self._metadata = metadata

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["path"] == PATH:
            await self._metadata(scope, receive, send)
        elif scope["path"] == "/health":
            await _say(send, 200, b"OK")
        else:
            await _say(send, 404, b"not found")


def _brings(headers: Iterable[_Header], token: bytes) -> bool:
    """As a bearer; or as a password, for clients that know no token: `http://ANY:TOKEN@HOST:PORT/metadata`."""
    for name, value in headers:
        if name == b"authorization":
            kind, _, given = value.partition(b" ")
            if kind.lower() == b"basic":
                try:
                    given = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
                except ValueError:
                    return False
            elif kind.lower() != b"bearer":
                return False
            return hmac.compare_digest(given.strip(), token)
    return False


async def _say(send: Send, status: int, text: bytes, *headers: _Header) -> None:
    await _send(send, status, text, (_TEXT, *headers))


async def _send(send: Send, status: int, body: bytes, headers: tuple[_Header, ...]) -> None:
    for message in _messages(status, body, headers):
        await send(message)


def _messages(status: int, body: bytes, headers: tuple[_Header, ...]) -> tuple[Message, Message]:
    length = (b"content-length", b"%d" % len(body))
    head = {"type": "http.response.start", "status": status, "headers": [*headers, length]}
    return head, {"type": "http.response.body", "body": body}


_UPDATED = _messages(200, b"metadata updated", (_TEXT,))  # what almost every put is answered


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
