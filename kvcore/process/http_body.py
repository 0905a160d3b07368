"""A request's body, read whole: bounded in size and in time, for every HTTP shell."""

import asyncio

from starlette.requests import ClientDisconnect, Request

from kvcore.errors import BodyLateError, InvalidRequestError, PayloadTooLargeError

BODY_TIMEOUT_S = 30.0


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes, within BODY_TIMEOUT_S. Raises PayloadTooLargeError without reading on."""
    too_large = PayloadTooLargeError(f"the body is over the bound of {limit} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise BodyLateError(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from error
    except ClientDisconnect as error:
        raise InvalidRequestError("the body was cut short") from error
    return bytes(body)
