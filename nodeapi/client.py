"""The nodes' control API over HTTP: msgpack bodies, and a stream of length-prefixed frames for decode legs.

Owns the translation of bodies and refusals. Decides nothing and retries nothing.
"""

import asyncio
from collections.abc import Sequence
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
from kvcore.trust.opening import OPEN, ClusterTrust
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.frames import FrameDecoder, FrameError
from nodeapi.http_calls import HttpCalls, OpenAnswer
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
from nodeapi.protocol import DeltaReader
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
"""Deltas that come at once and are taken in one turn; behind them others have theirs. A node may send thousands at
once, of 0.1 ms each where there are logprobs."""
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
        self._prompt: tuple[Sequence[int], msgspec.Raw] = (), msgspec.Raw()
        """The last one that was sent, and its bytes: a request's legs follow on each other."""
        self._reports: dict[str, tuple[bytes, NodeReport | None]] = {}
        """By URL, the last one and its bytes: read anew only where it says something else."""

    def __repr__(self) -> str:
        return f"<HttpNodeClient over {self._calls!r}>"

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """See NodeClient."""
        url = f"{url}/v1/prefill"
        return _decode(await self._calls.fetch("POST", url, self._body(request), timeout_s), PrefillResult, url)

    async def generate(
        self, url: str, request: GenerateRequest, reader: DeltaReader, *, first_s: float, gap_s: float
    ) -> None:
        """See NodeClient."""
        body = self._body(request)
        with await self._calls.open("POST", f"{url}/v1/generate", body, first_s) as answer:
            deltas = _Deltas(url, answer, reader, request.sampling.n, first_s=first_s, gap_s=gap_s)
            while await answer.pass_on(deltas.feed, deltas.until):
                if not await deltas.caught_up():
                    return
            deltas.check_ended()

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

    def _body(self, request: PrefillRequest | GenerateRequest) -> bytes:
        prompt, encoded = self._prompt
        if request.prompt_token_ids is not prompt:
            encoded = msgspec.Raw(self._encoder.encode(request.prompt_token_ids))
            self._prompt = request.prompt_token_ids, encoded
        return self._encoder.encode(msgspec.structs.replace(request, prompt_token_ids=encoded))

    async def _ask(self, url: str, request: msgspec.Struct, kind: type[_Reply], timeout_s: float) -> _Reply:
        return _decode(await self._calls.fetch("POST", url, self._encoder.encode(request), timeout_s), kind, url)


_decode_frame = msgspec.msgpack.Decoder(StreamFrame).decode


class _Deltas:
    """The frames of one answer on their way to their reader. `unfinished`: sequences whose finish has not come."""

    def __init__(
        self, url: str, answer: OpenAnswer, reader: DeltaReader, unfinished: int, *, first_s: float, gap_s: float
    ) -> None:
        self._url, self._answer, self._reader, self._gap_s = url, answer, reader, gap_s
        self._unfinished = unfinished
        self._now = asyncio.get_running_loop().time
        self.until = self._now() + first_s
        """When the next delta is late, in the loop's time."""
        self._cutter, self._seal = FrameDecoder(MAX_FRAME_BYTES), answer.seal
        self._untaken: Sequence[TokenDelta | StreamError] = ()
        self._held = False
        """The reader has said that it takes no more for now."""

    def feed(self, data: bytes) -> float:
        """See kvcore.http.connection.Feed. Nothing is untaken when it is called. A part of a frame is no delta."""
        if frames := self._frames_in(data):
            self.until = self._now() + self._gap_s
        return self.until if self._take(frames) else 0.0

    async def caught_up(self) -> bool:
        """Have the reader take what came with what it took last. False: it wants nothing more."""
        while True:
            if not self._held:
                await asyncio.sleep(0)
            elif not await self._reader.ready():
                return False
            if self._take(self._untaken):
                self.until = self._now() + self._gap_s
                return True

    def check_ended(self) -> None:
        """Raises NodeUnavailableError if the stream may not end here."""
        if not self._cutter.at_boundary:
            raise NodeUnavailableError(f"{self._url} broke off inside a frame")

    def _take(self, frames: Sequence[TokenDelta | StreamError]) -> bool:
        """As many as may be; the others are `_untaken`. Whether that is all."""
        for number, frame in enumerate(frames, 1):
            if isinstance(frame, StreamError):
                raise error_from_code(frame.code, frame.message)
            if frame.finish_reason is not None:
                self._unfinished -= 1
                self._answer.finished = not self._unfinished
            self._held = not self._reader.take(frame)
            if self._held or number == MAX_TAKEN:
                self._untaken = frames[number:]
                return False
        self._untaken = ()
        return True

    def _frames_in(self, data: bytes) -> list[TokenDelta | StreamError]:
        try:
            payloads = self._cutter.feed(data)
            if self._seal is not None:
                payloads = [self._seal.open(payload) for payload in payloads]
            return [_decode_frame(payload) for payload in payloads]
        except ProofError as error:
            raise NodeUnavailableError(f"{self._url}: {error.message}") from error
        except (FrameError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NodeUnavailableError(f"{self._url} sent a frame that cannot be read: {error}") from error


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
