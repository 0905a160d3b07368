"""The nodes' control API over HTTP: msgpack bodies, and a stream of length-prefixed frames for decode legs.

Owns the connections and the translation of every failure into kvcore.errors. Decides nothing and retries nothing.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import aiohttp
import msgspec

from engines.base import (
    GenerateRequest,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    StreamError,
    StreamFrame,
    TokenDelta,
)
from kvcore.errors import DeadlineExceededError, EngineError, KVFerryError, NodeUnavailableError, error_from_code
from kvcore.ports import why_unreachable

MAX_FRAME_BYTES = 4 << 20
MAX_REPLY_BYTES = 16 << 20
MAX_ERROR_BYTES = 64 << 10
_MSGPACK = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
_Reply = TypeVar("_Reply")


class _ErrorDetail(msgspec.Struct):
    code: str = "engine_error"
    message: str = ""
    retryable: bool = False


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail


class HttpNodeClient:
    """NodeClient over aiohttp with kept-alive connections. Entered and left on one event loop."""

    def __init__(self, *, connect_timeout_s: float, max_connections: int) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._frames = msgspec.msgpack.Decoder(StreamFrame)

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """See NodeClient."""
        reply = await self._whole("POST", f"{url}/v1/prefill", self._encoder.encode(request), timeout_s)
        return _decode(reply, PrefillResult, url)

    async def generate(self, url: str, request: GenerateRequest, *, timeout_s: float) -> AsyncGenerator[TokenDelta]:
        """See NodeClient."""
        body = self._encoder.encode(request)
        async with self._open("POST", f"{url}/v1/generate", body, timeout_s) as response:
            buffer = bytearray()
            while True:
                async with _deadline(url, timeout_s):
                    data = await response.content.readany()
                if not data:
                    if buffer:
                        raise NodeUnavailableError(f"{url} broke off inside a frame")
                    return
                buffer += data
                for frame in self._split(buffer, url):
                    if isinstance(frame, StreamError):
                        raise error_from_code(frame.code, frame.message)
                    yield frame

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        await self._whole("POST", f"{url}/v1/requests/{request_id}/end_handoff", b"", timeout_s)

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        await self._whole("DELETE", f"{url}/v1/requests/{request_id}", b"", timeout_s)

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        """See NodeClient."""
        return _decode(await self._whole("GET", f"{url}/v1/info", b"", timeout_s), NodeReport, url)

    async def aclose(self) -> None:
        """See NodeClient."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _split(self, buffer: bytearray, url: str) -> list[TokenDelta | StreamError]:
        frames: list[TokenDelta | StreamError] = []
        start = 0
        while len(buffer) - start >= 4:
            size = int.from_bytes(buffer[start : start + 4], "little")
            if size > MAX_FRAME_BYTES:
                raise NodeUnavailableError(f"{url} announced a frame of {size} bytes, over {MAX_FRAME_BYTES}")
            if len(buffer) - start - 4 < size:
                break
            try:
                frames.append(self._frames.decode(buffer[start + 4 : start + 4 + size]))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise NodeUnavailableError(f"{url} sent a frame that cannot be read: {error}") from error
            start += 4 + size
        del buffer[:start]
        return frames

    async def _whole(self, method: str, url: str, body: bytes, timeout_s: float) -> bytes:
        async with _deadline(url, timeout_s), self._open(method, url, body, timeout_s) as response:
            reply = bytearray()
            async for data in response.content.iter_any():
                reply += data
                if len(reply) > MAX_REPLY_BYTES:
                    raise NodeUnavailableError(f"{url} answered more than {MAX_REPLY_BYTES} bytes")
            return bytes(reply)

    @asynccontextmanager
    async def _open(
        self, method: str, url: str, body: bytes, timeout_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200; every other outcome, also while the caller reads, is an error of ours."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
                auto_decompress=False,
            )
        try:
            async with _deadline(url, timeout_s):
                response = await self._session.request(method, url, data=body or None, headers=_MSGPACK)
            async with response:
                if response.status >= 400:
                    raise await _refusal(response, url, timeout_s)
                yield response
        except (aiohttp.ClientError, OSError) as error:
            raise NodeUnavailableError(f"{url} cannot be reached or broke off: {why_unreachable(error)}") from error


@asynccontextmanager
async def _deadline(url: str, timeout_s: float) -> AsyncIterator[None]:
    timer = asyncio.timeout(timeout_s)
    try:
        async with timer:
            yield
    except TimeoutError as error:
        if not timer.expired():
            raise NodeUnavailableError(f"{url} could not be connected to in time") from error
        raise DeadlineExceededError(f"{url} did not answer within {timeout_s:.1f} s") from error


async def _refusal(response: aiohttp.ClientResponse, url: str, timeout_s: float) -> KVFerryError:
    async with _deadline(url, timeout_s):
        raw = await response.content.read(MAX_ERROR_BYTES)
    for decode in (msgspec.json.decode, msgspec.msgpack.decode):
        try:
            detail = decode(raw, type=_ErrorBody).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        return error_from_code(detail.code, detail.message)
    return EngineError(f"{url} answered {response.status} without an error body")


def _decode(raw: bytes, kind: type[_Reply], url: str) -> _Reply:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NodeUnavailableError(f"{url} sent a {kind.__name__} that cannot be read: {error}") from error
