"""A request's body, read whole: bounded in size and in time, never packed, for every HTTP shell."""

import asyncio
from collections.abc import Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from kvcore.errors import BodyLateError, InvalidRequestError, MediaTypeError, PayloadTooLargeError
from kvcore.process.http_exchange import exchange_of

ENCODINGS = {"content-encoding": ("", "identity"), "transfer-encoding": ("", "identity", "chunked")}
"""By header, the codings that leave a body as it is."""
_LENGTH_ALONE = {"content-length"}
_OF_BODIES = {name.encode(): name for name in (*ENCODINGS, "content-length")}


async def body_at_hand(scope: Scope, receive: Receive) -> bytes | None:
    """The body where all of it is there, which then needs no time limit: setting one takes as long as reading it. None:
    it is still to come, or nobody wants an answer."""
    exchange = exchange_of(scope)
    if exchange is None or exchange.more_body:
        return None
    if receive == exchange.receive:
        return exchange.take_body()
    message = await receive()  # another's, that checks what it passes on
    body: bytes | None = message.get("body") if message["type"] == "http.request" else None
    return body


async def read_body(request: Request, limit: int, *, timeout_s: float = 30.0) -> bytes:
    """As `body_of`, of this request."""
    return await body_of(request.scope, request.receive, limit, timeout_s=timeout_s)


async def body_of(scope: Scope, receive: Receive, limit: int, *, timeout_s: float) -> bytes:
    """The whole body, at most `limit` bytes, within `timeout_s`.

    Raises PayloadTooLargeError and MediaTypeError, without reading on, BodyLateError, and InvalidRequestError if the
    client breaks off.
    """
    given: dict[str, str] = {}
    for name, value in reversed(scope["headers"]):  # of several that have one name the first counts
        if name in _OF_BODIES:
            given[_OF_BODIES[name]] = value.decode("latin-1")
    if given.keys() != _LENGTH_ALONE:
        check_encoding(given)
    announced = given.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    if (whole := await body_at_hand(scope, receive)) is not None:
        if len(whole) > limit:
            raise _too_large(limit)
        return whole
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in Request(scope, receive).stream():
                body += part
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError as error:
        raise BodyLateError(f"the body did not arrive within {timeout_s:.0f} s") from error
    except ClientDisconnect as error:
        raise InvalidRequestError("the body was cut short") from error
    return bytes(body)


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"the body is over the bound of {limit} bytes")


def check_encoding(headers: Mapping[str, str]) -> None:
    """Raises MediaTypeError where the body is packed: unpacked it could be of any size. `headers`: of any case."""
    for name, plain in ENCODINGS.items():
        if (coding := headers.get(name, "")).strip().lower() not in plain:
            raise MediaTypeError(f"{name} {coding[:100]!r} is not read here: send the body as it is")
