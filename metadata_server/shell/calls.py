"""The table's calls over HTTP, plain ASGI: formats and bounds of bodies, long polls that end with their client.

Hot path: the framework's request and response would take as long as the rest of a call. What goes wrong is answered by
`create_app`'s error handlers.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvcore.clock import Clock
from kvcore.errors import MetadataProtocolError, PayloadTooLargeError
from kvcore.process.audit import caller
from kvcore.process.certified_app import SPEAKS_FOR
from kvcore.process.http_body import ENCODINGS, body_at_hand, check_encoding
from metadata_server.core import MetadataCore
from metadata_server.endpoints import ENDPOINTS
from metadata_server.limits import ServerLimits
from metadata_server.protocol import Asker
from metadata_server.shell.openapi import JSON, MSGPACK

_BINARY = frozenset({"", MSGPACK, "application/x-msgpack", "application/vnd.msgpack", "application/octet-stream"})
_KINDS = {json: (b"content-type", kind.encode()) for json, kind in ((True, JSON), (False, MSGPACK))}


class Calls:
    """ASGI: a POST of one of `paths`, whatever its method is."""

    def __init__(
        self,
        core: MetadataCore,
        clock: Clock,
        *,
        observe: Callable[[str], Callable[[float], None]],
        answer_error: Callable[[Request, Exception], Awaitable[Response]],
        max_body_bytes: int,
        limits: ServerLimits,
    ) -> None:
        """`observe`: gives what takes the seconds of one path's calls."""
        self._core = core
        self._clock = clock
        self._answer_error = answer_error
        self._max_body_bytes = max_body_bytes
        self._body_s = limits.body_s
        self.paths = {row.path: (row, observe(row.path)) for row in ENDPOINTS if row.request is not None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        try:
            headers = dict(scope["headers"])
            json_in, json_out = formats(headers.get(b"content-type", b""), headers.get(b"accept", b""))
            body = await self._read(scope, headers, receive)
            started, path = self._clock.now(), scope["path"]
            endpoint, observe = self.paths[path]
            address = caller(scope.get("client")) if endpoint.about is not None else ""
            who = Asker(address, scope.get(SPEAKS_FOR))
            call = self._core.dispatch(path, body, json=json_in, reply_json=json_out, who=who)
            reply = await (_unless_gone(receive, call) if endpoint.waits else call)
            observe(self._clock.now() - started)
        except Exception as error:  # request boundary
            response = await self._answer_error(Request(scope), error)
            await response(scope, receive, send)
            return
        length = (b"content-length", b"%d" % len(reply))
        await send({"type": "http.response.start", "status": 200, "headers": [_KINDS[json_out], length]})
        await send({"type": "http.response.body", "body": reply})

    async def _read(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body. Raises MediaTypeError, PayloadTooLargeError as soon as it is known to be too long, and
        ClientDisconnect."""
        if b"content-encoding" in headers or b"transfer-encoding" in headers:
            check_encoding({name: headers.get(name.encode(), b"").decode("latin-1") for name in ENCODINGS})
        declared, most = headers.get(b"content-length", b"")[:20], self._max_body_bytes
        if declared.isdigit() and int(declared) > most:
            raise PayloadTooLargeError(f"the body has {int(declared)} bytes; at most {most} are read")
        if (whole := await body_at_hand(scope, receive)) is not None:
            if len(whole) > most:
                raise PayloadTooLargeError(f"the body has more than {most} bytes")
            return whole
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self._body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part: bytes = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise PayloadTooLargeError(f"the body has more than {most} bytes")
                    parts.append(part)
                    if not message.get("more_body", False):
                        return part if len(parts) == 1 else b"".join(parts)
        except TimeoutError as error:
            raise MetadataProtocolError(f"the body did not arrive within {self._body_s:g} s") from error


@lru_cache(maxsize=256)
def formats(content_type: bytes, accept: bytes) -> tuple[bool, bool]:
    """Whether the body is JSON (else msgpack), and whether the reply is to be. Raises HTTPException."""
    kind = content_type.decode("latin-1").partition(";")[0].strip().lower()
    if kind != JSON and kind not in _BINARY:
        raise HTTPException(415, f"Content-Type {kind[:100]!r}: send {MSGPACK} or {JSON}")
    return kind == JSON, wants_json(accept.decode("latin-1"), default=kind == JSON)


def wants_json(accept: str, *, default: bool) -> bool:
    """Whether the reply is to be JSON, by an Accept header."""
    json, binary = JSON in accept.lower(), "msgpack" in accept.lower()
    return default if json == binary else json


async def _unless_gone(receive: Receive, call: Awaitable[bytes]) -> bytes:
    """Cancel a long poll when its client leaves: nobody would take its lease. The body has been read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer, watch = asyncio.ensure_future(call), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        watch.cancel()
        await asyncio.wait({answer, watch})
