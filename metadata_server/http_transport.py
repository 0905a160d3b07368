"""The metadata client's way over HTTP (`kvcore.http`), and the subscription's (aiohttp): deadlines, frames.

Connections are made on the first call, inside the caller's loop. Their errors are translated here and nowhere else.
"""

import asyncio
from collections.abc import AsyncGenerator

import aiohttp
import msgspec

from kvcore.errors import (
    MetadataProofError,
    MetadataProtocolError,
    MetadataUnavailableError,
    NodeRefusedError,
    NotLeaderError,
    ProofError,
)
from kvcore.http.errors import ProofNotTakenError
from kvcore.http.pool import HttpPool
from kvcore.ports import why_unreachable
from kvcore.process.http_client import frame_seal, http_session, internal_ssl
from kvcore.trust.opening import OPEN, ClusterTrust
from metadata_server.endpoints import ENDPOINTS
from metadata_server.limits import ClientLimits

_MSGPACK = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}


_LONG_POLLS = frozenset(endpoint.path for endpoint in ENDPOINTS if endpoint.waits)


class HttpMetadataTransport:
    """`MetadataTransport` to `url` (http://host:port) over kept-alive connections. Long polls have connections of their
    own: however many there are, they hold no other call up."""

    def __init__(self, url: str, limits: ClientLimits = ClientLimits(), trust: ClusterTrust = OPEN) -> None:
        self._url = trust.url(url.rstrip("/"))
        self._trust = trust
        self._limits = limits
        self._pools: dict[bool, HttpPool] = {}
        """By whether they carry long polls."""

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        """See `MetadataTransport.call`."""
        waits = path in _LONG_POLLS
        pool = self._pools.get(waits)
        if pool is None:
            pool = self._pools[waits] = self._new_pool(waits=waits)
        url, most = self._url + path, self._limits.max_frame_bytes
        try:
            answer = await pool.call("POST" if body else "GET", url, body, timeout_s, num_bytes=most + 1)
        except TimeoutError as error:
            raise MetadataUnavailableError(f"{url} did not answer within {timeout_s:.3g} s") from error
        except ProofNotTakenError as error:
            raise MetadataProofError(str(error)) from error
        except OSError as error:
            raise MetadataUnavailableError(f"{url}: {why_unreachable(error)}") from error
        try:
            if answer.num_unread > most:
                raise MetadataProtocolError(f"{url} answered more than {most} bytes")
            reply = answer.take()
            if answer.proven is not None:
                answer.proven.check(reply)
        except ProofError as error:
            raise MetadataUnavailableError(f"{url}: {error.message}") from error
        finally:
            answer.end()
        if answer.status >= 400:
            raise _error_of(url, answer.status, reply)
        return reply

    async def aclose(self) -> None:
        """Close the connections. Idempotent."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def _new_pool(self, *, waits: bool) -> HttpPool:
        limits = self._limits
        return HttpPool(
            connect_timeout_s=limits.silence_s,
            max_connections=limits.max_waits if waits else limits.max_connections,
            keepalive_s=limits.idle_connection_s,
            headers=_MSGPACK,
            trust=self._trust,
        )


class HttpEventSource:
    """`EventSource` over GET /v1/events of `url`."""

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float = 2.0,
        limits: ClientLimits = ClientLimits(),
        trust: ClusterTrust = OPEN,
    ) -> None:
        self._url = trust.url(url.rstrip("/"))
        self._trust = trust
        self._limits = limits
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s, sock_read=limits.silence_s)
        self._session: aiohttp.ClientSession | None = None

    async def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        """See `EventSource.batches`."""
        if self._session is None:
            self._session = _new_session(self._limits, self._limits.max_connections, self._trust)
        url = self._url + "/v1/events"
        params = {"epoch": epoch, "from_seq": str(from_seq)}
        try:
            async with self._session.get(url, params=params, headers=_MSGPACK, timeout=self._timeout) as response:
                if response.status != 200:
                    raise _error_of(url, response.status, await response.read())
                seal = frame_seal(response)
                while True:
                    size = int.from_bytes(await response.content.readexactly(4), "little")
                    if size > self._limits.max_frame_bytes:
                        raise MetadataProtocolError(f"{url} sent a frame of {size} bytes")
                    frame = await response.content.readexactly(size)
                    yield frame if seal is None else seal.open(frame)
        except asyncio.IncompleteReadError as error:
            raise MetadataUnavailableError(f"{url} ended") from error
        except ProofError as error:
            raise MetadataUnavailableError(f"{url}: {error.message}") from error
        except TimeoutError as error:
            raise MetadataUnavailableError(f"{url} was silent for {self._limits.silence_s} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise MetadataUnavailableError(f"{url}: {why_unreachable(error)}") from error

    async def aclose(self) -> None:
        """Close the connection. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class _FaultText(msgspec.Struct):
    message: str
    code: str = ""
    leader: str = ""


class _FaultBody(msgspec.Struct):
    error: _FaultText


def _new_session(limits: ClientLimits, max_connections: int, trust: ClusterTrust) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(
        limit=max_connections, keepalive_timeout=limits.idle_connection_s, ssl=internal_ssl(trust)
    )
    return http_session(
        trust=trust,
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _error_of(what: str, status: int, body: bytes) -> MetadataUnavailableError | MetadataProtocolError:
    try:
        fault = msgspec.msgpack.decode(body, type=_FaultBody).error
    except msgspec.MsgspecError:
        fault = _FaultText(body[:200].decode("utf-8", "replace"))
    if fault.code == NodeRefusedError.code:
        return NodeRefusedError(fault.message)
    text = f"{what} answered {status}: {fault.message}"
    if fault.code == NotLeaderError.code:
        return NotLeaderError(text, leader=fault.leader)
    return MetadataUnavailableError(text) if status >= 500 else MetadataProtocolError(text)
