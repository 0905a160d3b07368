"""The nodes' control API over HTTP: msgpack bodies, and a stream of length-prefixed frames for decode legs.

Owns the translation of bodies and refusals. Decides nothing and retries nothing.
"""

from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

import msgspec

from kvcore.errors import (
    EngineError,
    KVFerryError,
    NodeUnavailableError,
    NodeVersionError,
    ProofError,
    error_from_code,
)
from kvcore.trust.http_proof import FrameSeal
from kvcore.trust.opening import OPEN, ClusterTrust
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.frames import FrameDecoder, FrameError
from nodeapi.http_calls import HttpCalls
from nodeapi.messages import (
    OLDEST_PROTOCOL,
    PROTOCOL,
    GenerateRequest,
    Greeting,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    PromoteReply,
    PromoteRequest,
    StreamError,
    StreamFrame,
    TokenDelta,
)
from nodeapi.protocol import TakeDelta
from nodeapi.upkeep import (
    ChunksReply,
    ChunksRequest,
    ClearReply,
    ClearRequest,
    GenerationsReply,
    GenerationsRequest,
    WeightsReply,
    WeightsRequest,
)

MAX_FRAME_BYTES = 4 << 20
MAX_TAKEN = 32
"""Deltas that come at once and are given straight to who takes them; behind them others have their turn."""
MAX_REPORT_BYTES = 1 << 20
"""Of nodes of which nothing is known yet many are asked at once."""
_REPORTS_KEPT, _LONGEST_KEPT = 4096, 16 << 10
_MSGPACK = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
_Reply = TypeVar("_Reply")


class _NodeError(msgspec.Struct):
    code: str = "engine_error"
    message: str = ""
    retryable: bool = False


class _NodeErrorBody(msgspec.Struct):
    error: _NodeError


class HttpNodeClient:
    """NodeClient over HTTP with kept-alive connections. Entered and left on one event loop."""

    def __init__(self, *, connect_timeout_s: float, max_connections: int, trust: ClusterTrust = OPEN) -> None:
        self._calls = HttpCalls(
            _refusal,
            connect_timeout_s=connect_timeout_s,
            max_connections=max_connections,
            headers=_MSGPACK,
            trust=trust,
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._reports: dict[str, tuple[bytes, NodeReport | None]] = {}
        """By URL, the last one and its bytes: read anew only where it says something else."""
        self._frames = msgspec.msgpack.Decoder(StreamFrame)

    def __repr__(self) -> str:
        return f"<HttpNodeClient over {self._calls!r}>"

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """See NodeClient."""
        return await self._ask(f"{url}/v1/prefill", request, PrefillResult, timeout_s)

    async def generate(
        self, url: str, request: GenerateRequest, *, timeout_s: float, take: TakeDelta | None = None
    ) -> AsyncGenerator[TokenDelta]:
        """See NodeClient."""
        body = self._encoder.encode(request)
        unfinished = request.sampling.n
        with await self._calls.open("POST", f"{url}/v1/generate", body, timeout_s) as answer:
            cutter, unread = FrameDecoder(MAX_FRAME_BYTES), deque[TokenDelta | StreamError]()

            def feed(data: bytes) -> bool:
                frames = self._frames_in(data, cutter, url, answer.seal)
                for at, frame in enumerate(frames):
                    if take is None or unread or at == MAX_TAKEN or isinstance(frame, StreamError) or not take(frame):
                        unread.extend(frames[at:])
                        break
                return not unread

            more = True
            while more:
                more = await answer.pass_on(feed, timeout_s)
                while unread:
                    frame = unread.popleft()
                    if isinstance(frame, StreamError):
                        raise error_from_code(frame.code, frame.message)
                    if frame.finish_reason is not None:
                        unfinished -= 1
                        answer.finished = not unfinished
                    yield frame
            if not cutter.at_boundary:
                raise NodeUnavailableError(f"{url} broke off inside a frame")

    async def compare(self, url: str, request: CompareRequest, *, timeout_s: float) -> CompareReply:
        """Have the node compute a prompt both ways. Raises as the other calls do."""
        return await self._ask(f"{url}/v1/compare", request, CompareReply, timeout_s)

    async def promote(self, url: str, request: PromoteRequest, *, timeout_s: float) -> PromoteReply:
        """Have the node bring chunks from its own tiers into its segment. Raises as the other calls do."""
        return await self._ask(f"{url}/v1/promote", request, PromoteReply, timeout_s)

    async def generations(self, url: str, request: GenerationsRequest, *, timeout_s: float) -> GenerationsReply:
        """What lies in the node's segment and tiers. Raises as the other calls do."""
        return await self._ask(f"{url}/v1/upkeep/generations", request, GenerationsReply, timeout_s)

    async def chunks(self, url: str, request: ChunksRequest, *, timeout_s: float) -> ChunksReply:
        """An order about chunks in the node's tiers."""
        return await self._ask(f"{url}/v1/upkeep/chunks", request, ChunksReply, timeout_s)

    async def clear(self, url: str, request: ClearRequest, *, timeout_s: float) -> ClearReply:
        """Remove generations from the node's tiers."""
        return await self._ask(f"{url}/v1/upkeep/clear", request, ClearReply, timeout_s)

    async def weights(self, url: str, request: WeightsRequest, *, timeout_s: float) -> WeightsReply:
        """Have the node's engine started anew with other weights."""
        return await self._ask(f"{url}/v1/weights", request, WeightsReply, timeout_s)

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        await self._calls.fetch("POST", f"{url}/v1/requests/{request_id}/end_handoff", b"", timeout_s)

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        await self._calls.fetch("DELETE", f"{url}/v1/requests/{request_id}", b"", timeout_s)

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        """See NodeClient."""
        reply = await self._calls.fetch("GET", f"{url}/v1/info", b"", timeout_s, most=MAX_REPORT_BYTES)
        said, report = self._reports.get(url, (b"", None))
        if report is None or reply != said:
            _check_common_version(_decode(reply, Greeting, url), url)
            report = _decode(reply, NodeReport, url)
            if len(self._reports) >= _REPORTS_KEPT:
                self._reports.clear()
            self._reports[url] = (reply, report) if len(reply) <= _LONGEST_KEPT else (b"", None)
        return report

    async def aclose(self) -> None:
        """See NodeClient."""
        await self._calls.aclose()

    async def _ask(self, url: str, request: msgspec.Struct, kind: type[_Reply], timeout_s: float) -> _Reply:
        return _decode(await self._calls.fetch("POST", url, self._encoder.encode(request), timeout_s), kind, url)

    def _frames_in(
        self, data: bytes, cutter: FrameDecoder, url: str, seal: FrameSeal | None
    ) -> list[TokenDelta | StreamError]:
        opened: Callable[[bytes], bytes] = bytes if seal is None else seal.open
        try:
            return [self._frames.decode(opened(payload)) for payload in cutter.feed(data)]
        except ProofError as error:
            raise NodeUnavailableError(f"{url}: {error.message}") from error
        except (FrameError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NodeUnavailableError(f"{url} sent a frame that cannot be read: {error}") from error


def _check_common_version(node: Greeting, url: str) -> None:
    if min(PROTOCOL, node.protocol) < max(OLDEST_PROTOCOL, node.oldest_protocol):
        raise NodeVersionError(
            f"{url} speaks versions {node.oldest_protocol} to {node.protocol} of the nodes' API, this router "
            f"{OLDEST_PROTOCOL} to {PROTOCOL}: upgrade {'the node' if node.protocol < PROTOCOL else 'the router'}"
        )


def _refusal(status: int, raw: bytes, url: str) -> KVFerryError:
    for decode in (msgspec.json.decode, msgspec.msgpack.decode):
        try:
            detail = decode(raw, type=_NodeErrorBody).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        return error_from_code(detail.code, detail.message)
    return EngineError(f"{url} answered {status} without an error body")


def _decode(raw: bytes, kind: type[_Reply], url: str) -> _Reply:
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NodeUnavailableError(f"{url} sent a {kind.__name__} that cannot be read: {error}") from error
