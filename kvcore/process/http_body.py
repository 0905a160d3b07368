"""A request's body, read whole: bounded in size and in time, never packed, for every HTTP shell."""

import asyncio
from collections.abc import Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from kvcore.errors import BodyLateError, InvalidRequestError, MediaTypeError, PayloadTooLargeError

ENCODINGS = {"content-encoding": ("", "identity"), "transfer-encoding": ("", "identity", "chunked")}
"""By header, the codings that leave a body as it is."""
_OF_BODIES = {name.encode(): name for name in (*ENCODINGS, "content-length")}
WHOLE_BODY = "kvferry.whole_body"
"""Among a request's `extensions` where all of its body was there when the application was asked."""


async def body_at_hand(scope: Scope, receive: Receive) -> bytes | None:
    """The body where all of it is there, which then needs no time limit: setting one takes as long as reading it. None:
    it is still to come, or nobody wants an answer."""
    if WHOLE_BODY not in scope.get("extensions", ()):
        return None
    message = await receive()
    body: bytes | None = message.get("body") if message["type"] == "http.request" else None
    return body


async def read_body(request: Request, limit: int, *, timeout_s: float = 30.0) -> bytes:
    """The whole body, at most `limit` bytes, within `timeout_s`.

    Raises PayloadTooLargeError and MediaTypeError, without reading on, BodyLateError, and InvalidRequestError if the
    client breaks off.
    """
    found = reversed(request.scope["headers"])  # of several that have one name the first counts
    given = {_OF_BODIES[name]: value.decode("latin-1") for name, value in found if name in _OF_BODIES}
    check_encoding(given)
    too_large = PayloadTooLargeError(f"the body is over the bound of {limit} bytes")
    announced = given.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    if (whole := await body_at_hand(request.scope, request.receive)) is not None:
        if len(whole) > limit:
            raise too_large
        return whole
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise BodyLateError(f"the body did not arrive within {timeout_s:.0f} s") from error
    except ClientDisconnect as error:
        raise InvalidRequestError("the body was cut short") from error
    return bytes(body)


def check_encoding(headers: Mapping[str, str]) -> None:
    """Raises MediaTypeError where the body is packed: unpacked it could be of any size. `headers`: of any case."""
    for name, plain in ENCODINGS.items():
        if (coding := headers.get(name, "")).strip().lower() not in plain:
            raise MediaTypeError(f"{name} {coding[:100]!r} is not read here: send the body as it is")
