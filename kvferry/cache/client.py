"""The router as `kvferry cache` asks it. Every failure is one sentence that names what to do."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import aiohttp
import msgspec

from kvcore.ports import why_unreachable
from kvcore.process.http_client import operators_session
from kvcore.trust.opening import OPEN, ClusterTrust
from kvferry.router_url import key_headers

_Reply = TypeVar("_Reply")


class CacheCommandError(Exception):
    """The router is away or refuses. Its text is a sentence for people."""


class _Said(msgspec.Struct):
    message: str


class _SaidBody(msgspec.Struct):
    error: _Said


class RouterCalls:
    """Made by `router_calls`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._session = session

    async def get(self, path: str, kind: type[_Reply]) -> _Reply:
        """Raises CacheCommandError."""
        return await self._ask("GET", path, None, {}, kind)

    async def post(self, path: str, body: object, kind: type[_Reply], **query: str) -> _Reply:
        """Raises CacheCommandError. Cancelling it ends what the router does for it."""
        return await self._ask("POST", path, msgspec.json.encode(body), query, kind)

    async def _ask(
        self, method: str, path: str, body: bytes | None, query: Mapping[str, str], kind: type[_Reply]
    ) -> _Reply:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            async with self._session.request(
                method, self.url + path, data=body, params=query, headers=headers
            ) as reply:
                raw = await reply.read()
        except TimeoutError:
            raise CacheCommandError(f"the router at {self.url} did not answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            why = why_unreachable(error)
            raise CacheCommandError(
                f"the router at {self.url} is not there ({why}): is the cluster up? --url or --config says where it is"
            ) from error
        if reply.status != 200:
            raise CacheCommandError(_refusal(reply.status, raw, f"{method} {path}", self.url))
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.DecodeError as error:
            text = f"{self.url}{path} answers what this version does not understand: {error}"
            raise CacheCommandError(text) from error


def _refusal(status: int, raw: bytes, what: str, url: str) -> str:
    try:
        said = msgspec.json.decode(raw, type=_SaidBody).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = raw[:200].decode("utf-8", "replace")
    if status == 404 and "Not Found" in said:
        return f"the server at {url} knows no {what}: it is no router of kvferry, or an older one"
    return said


@asynccontextmanager
async def router_calls(
    url: str, *, timeout_s: float = 900.0, connect_s: float = 5.0, trust: ClusterTrust = OPEN, tenant: str = ""
) -> AsyncIterator[RouterCalls]:
    """Calls of the router at `url`, with the API key of the environment. `tenant`: in whose name an admin asks."""
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=connect_s)
    headers = key_headers() | ({"X-KVFerry-Tenant": tenant} if tenant else {})
    async with operators_session(trust=trust, timeout=timeout, headers=headers) as session:
        yield RouterCalls(url, session)
