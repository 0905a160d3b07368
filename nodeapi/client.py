"""The nodes' control API over HTTP: msgpack bodies, and a stream of length-prefixed frames for decode legs.

Owns the translation of bodies and refusals. Decides nothing and retries nothing.
"""

from collections.abc import AsyncGenerator
from typing import TypeVar

import msgspec

from kvcore.errors import EngineError, KVFerryError, NodeUnavailableError, error_from_code
from nodeapi.http_calls import HttpCalls, deadline
from nodeapi.messages import (
    GenerateRequest,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    StreamError,
    StreamFrame,
    TokenDelta,
)

MAX_FRAME_BYTES = 4 << 20
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
        self._calls = HttpCalls(
            _refusal, connect_timeout_s=connect_timeout_s, max_connections=max_connections, headers=_MSGPACK
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._frames = msgspec.msgpack.Decoder(StreamFrame)

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """See NodeClient."""
        reply = await self._calls.whole("POST", f"{url}/v1/prefill", self._encoder.encode(request), timeout_s)
        return _decode(reply, PrefillResult, url)

    async def generate(self, url: str, request: GenerateRequest, *, timeout_s: float) -> AsyncGenerator[TokenDelta]:
        """See NodeClient."""
        body = self._encoder.encode(request)
        async with self._calls.open("POST", f"{url}/v1/generate", body, timeout_s) as response:
            buffer = bytearray()
            while True:
                async with deadline(url, timeout_s):
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
        await self._calls.whole("POST", f"{url}/v1/requests/{request_id}/end_handoff", b"", timeout_s)

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        await self._calls.whole("DELETE", f"{url}/v1/requests/{request_id}", b"", timeout_s)

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        """See NodeClient."""
        return _decode(await self._calls.whole("GET", f"{url}/v1/info", b"", timeout_s), NodeReport, url)

    async def aclose(self) -> None:
        """See NodeClient."""
        await self._calls.aclose()

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


def _refusal(status: int, raw: bytes, url: str) -> KVFerryError:
    for decode in (msgspec.json.decode, msgspec.msgpack.decode):
        try:
            detail = decode(raw, type=_ErrorBody).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        return error_from_code(detail.code, detail.message)
    return EngineError(f"{url} answered {status} without an error body")


def _decode(raw: bytes, kind: type[_Reply], url: str) -> _Reply:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NodeUnavailableError(f"{url} sent a {kind.__name__} that cannot be read: {error}") from error
