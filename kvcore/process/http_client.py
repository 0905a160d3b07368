"""Sessions of our HTTP clients. None follows a redirect: it would send a body, with tokens or a key, to whom the answer
names, and no server of a cluster has reason for one.
"""

from typing import Any

import aiohttp


class RedirectedError(aiohttp.ClientError):
    """A server answered with a redirect."""


def http_session(**options: Any) -> aiohttp.ClientSession:
    """An aiohttp session with these options, whose calls raise RedirectedError where the answer is a redirect. Made
    inside the loop that uses it."""
    return aiohttp.ClientSession(middlewares=(_refuse_redirects,), **options)


async def _refuse_redirects(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    response = await send(request)
    if 300 <= response.status < 400:
        location = response.headers.get("Location", "nowhere")
        response.close()
        raise RedirectedError(
            f"{request.url} answered {response.status}, a redirect to {location}, which is not followed: "
            "name the server itself"
        )
    return response
