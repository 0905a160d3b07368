"""Calls to nodes over HTTP with kept-alive connections: deadlines, bounds, and every failure as one of kvcore.errors.

Owns the connections. The caller says what a refusal means. Decides nothing and retries nothing.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp

from kvcore.errors import DeadlineExceededError, KVFerryError, NoDescriptorsError, NodeUnavailableError
from kvcore.ports import why_no_peer, why_unreachable
from kvcore.process.descriptors import are_exhausted, soft_limit
from kvcore.process.http_client import http_session
from kvcore.trust.opening import OPEN, ClusterTrust

MAX_REPLY_BYTES = 16 << 20
MAX_ERROR_BYTES = 64 << 10
Refusal = Callable[[int, bytes, str], KVFerryError]
"""(status of 400 or more, the beginning of the body, URL) -> what it means."""


class HttpCalls:
    """Entered and left on one event loop; connects when first used. Cancelling a call drops its connection."""

    def __init__(
        self,
        refusal: Refusal,
        *,
        connect_timeout_s: float,
        max_connections: int,
        headers: Mapping[str, str],
        keepalive_s: float = 15.0,
        trust: ClusterTrust = OPEN,
    ) -> None:
        self._refusal = refusal
        self._connect_timeout_s = connect_timeout_s
        self._max_connections = max_connections
        self._headers = dict(headers)
        self._keepalive_s = keepalive_s
        self._trust = trust
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        state = "not connected" if self._session is None else "connected"
        return f"<HttpCalls {state}, at most {self._max_connections} connections>"

    async def fetch(
        self,
        method: str,
        url: str,
        body: bytes,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        *,
        most: int = MAX_REPLY_BYTES,
    ) -> bytes:
        """The body of an answer, of at most so many bytes, all of it within `timeout_s`."""
        async with deadline(url, timeout_s), self.open(method, url, body, timeout_s, headers) as response:
            reply = bytearray()
            async for data in response.content.iter_any():
                reply += data
                if len(reply) > most:
                    raise NodeUnavailableError(f"{url} answered more than {most} bytes")
            return bytes(reply)

    @asynccontextmanager
    async def open(
        self, method: str, url: str, body: bytes, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200, whose head came within `timeout_s`. Every other outcome raises an error of
        kvcore.errors, also one that comes while the caller reads the body."""
        if self._session is None:
            self._session = http_session(
                trust=self._trust,
                connector=aiohttp.TCPConnector(
                    limit=self._max_connections, keepalive_timeout=self._keepalive_s, socket_factory=_peer_socket
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
                auto_decompress=False,
            )
        try:
            async with deadline(url, timeout_s):
                response = await self._session.request(method, url, data=body or None, headers=headers)
            async with response:
                if response.status >= 400:
                    async with deadline(url, timeout_s):
                        raw = await response.content.read(MAX_ERROR_BYTES)
                    raise self._refusal(response.status, raw, url)
                yield response
        except (aiohttp.ClientError, OSError) as error:
            if are_exhausted(error):
                raise NoDescriptorsError(
                    f"no file descriptor is left for a connection to {url}: this process may have {soft_limit()}; "
                    "raise its limit (ulimit -Hn, LimitNOFILE=) or lower router.max_requests"
                ) from error
            raise NodeUnavailableError(f"{url} cannot be reached or broke off: {why_unreachable(error)}") from error

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _peer_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """For a connection to an address that a name stands for, or that was given as one."""
    family, kind, protocol, _, where = address
    if (why := why_no_peer(str(where[0]))) is not None:
        raise OSError(f"{where[0]} {why}")
    return socket.socket(family=family, type=kind, proto=protocol)


@asynccontextmanager
async def deadline(url: str, timeout_s: float) -> AsyncIterator[None]:
    """The block takes at most `timeout_s`: DeadlineExceededError. A late connection is NodeUnavailableError."""
    timer = asyncio.timeout(timeout_s)
    try:
        async with timer:
            yield
    except TimeoutError as error:
        if not timer.expired():
            raise NodeUnavailableError(f"{url} could not be connected to in time") from error
        raise DeadlineExceededError(f"{url} did not answer within {timeout_s:.1f} s") from error
