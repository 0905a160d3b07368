"""The production protocols over the simulated network: metadata calls, the event stream, nodes' control calls."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

import msgspec
from support.delta_readers import give
from support.sim_http import App, SimHttp, Stream
from support.sim_network import LateError, NetworkError, SimNetwork, SimProcess

from kvcore.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    KVFerryError,
    MetadataProtocolError,
    MetadataUnavailableError,
    NodeUnavailableError,
    NotLeaderError,
    error_from_code,
)
from metadata_server.core import MetadataCore
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.messages import (
    GenerateRequest,
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

T = TypeVar("T")
METADATA = "metadata"
SILENCE_S = 5.0
REPEATABLE = frozenset(
    [
        "/v1/nodes/heartbeat",
        "/v1/nodes/register",
        "/v1/objects/commit",
        "/v1/objects/abort",
        "/v1/leases/release",
        "/v1/objects/quarantine",
    ]
)


Answer = Callable[[str, bytes], Awaitable[bytes]]
Events = Callable[[str, int], AsyncGenerator[bytes, None]]


class SimMetadataTransport:
    """`MetadataTransport` of one process to the server on `host`, of which `answer` is what a call gets. `http`: by it
    instead. Calls of `repeatable` paths may come twice."""

    def __init__(
        self,
        network: SimNetwork,
        source: SimProcess,
        answer: Answer,
        host: str = METADATA,
        *,
        http: SimHttp | None = None,
        repeatable: frozenset[str] = REPEATABLE,
    ) -> None:
        self._network, self._source, self._answer, self._host = network, source, answer, host
        self._http, self._repeatable = http, repeatable

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        """See MetadataTransport."""
        again = path in self._repeatable
        try:
            if self._http is not None:
                method = "POST" if body else "GET"
                return await self._http.call(
                    self._source, self._host, method, path, body, timeout_s=timeout_s, repeatable=again
                )
            return await self._network.call(
                self._source, self._host, lambda _: self._answer(path, body), timeout_s=timeout_s, repeatable=again
            )
        except NetworkError as error:
            raise MetadataUnavailableError(str(error)) from error
        except (MetadataProtocolError, NotLeaderError):
            raise
        except KVFerryError as error:
            raise MetadataUnavailableError(error.message) from error

    async def aclose(self) -> None:
        """Nothing is held."""


class SimEventSource:
    """`EventSource` of one process, as SimMetadataTransport."""

    def __init__(
        self,
        network: SimNetwork,
        source: SimProcess,
        events: Events,
        host: str = METADATA,
        *,
        http: SimHttp | None = None,
    ) -> None:
        self._network, self._source, self._events, self._host, self._http = network, source, events, host, http

    async def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        """See EventSource."""
        if self._http is not None:
            path = f"/v1/events?epoch={epoch}&from_seq={from_seq}"
            stream = self._http.frames(self._source, self._host, "GET", path, b"", silence_s=SILENCE_S)
        else:
            stream = self._network.stream(self._source, self._host, lambda _: self._events(epoch, from_seq), SILENCE_S)
        try:
            async for batch in stream:
                yield batch
        except NetworkError as error:
            raise MetadataUnavailableError(str(error)) from error
        except NotLeaderError:
            raise
        except KVFerryError as error:
            raise MetadataUnavailableError(error.message) from error
        finally:
            await stream.aclose()

    async def aclose(self) -> None:
        """Nothing is held."""


def metadata_app(core: MetadataCore) -> tuple[App, Stream]:
    """What a server with this core serves."""

    async def call(path: str, body: bytes) -> bytes:
        return await core.dispatch(path, body)

    def events(path: str, _: bytes) -> AsyncGenerator[bytes, None]:
        asked = dict(parse_qsl(urlsplit(path).query))
        return core.events(asked.get("epoch", ""), int(asked.get("from_seq", 0)))

    return call, events


class NodeService:
    """What a simulated node answers; see `sim_nodes`. Each raises errors of kvcore.errors."""

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """As the control API."""
        raise NotImplementedError

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """As the control API."""
        raise NotImplementedError

    async def end_handoff(self, request_id: str) -> None:
        """As the control API."""
        raise NotImplementedError

    async def compare(self, request: CompareRequest) -> CompareReply:
        """As the control API."""
        raise NotImplementedError

    async def promote(self, request: PromoteRequest) -> PromoteReply:
        """As the control API."""
        raise NotImplementedError

    async def abort(self, request_id: str) -> None:
        """As the control API."""
        raise NotImplementedError

    async def report(self) -> NodeReport:
        """As the control API."""
        raise NotImplementedError


def node_app(node: NodeService) -> tuple[App, Stream]:
    """What a node serves."""

    async def call(path: str, body: bytes) -> bytes:
        if path == "/v1/prefill":
            return _encode(await node.prefill(_decode(body, PrefillRequest)))
        if path == "/v1/compare":
            return _encode(await node.compare(_decode(body, CompareRequest)))
        if path == "/v1/promote":
            return _encode(await node.promote(_decode(body, PromoteRequest)))
        if path == "/v1/info":
            return _encode(await node.report())
        _, _, kind, request_id, *more = [*path.split("/"), "", ""]
        if kind != "requests":
            raise InvalidRequestError(f"no such path: {path}")
        await (node.end_handoff(request_id) if more[0] else node.abort(request_id))
        return b""

    async def generate(_: str, body: bytes) -> AsyncGenerator[bytes, None]:
        begun = False
        try:
            async with aclosing(node.generate(_decode(body, GenerateRequest))) as deltas:
                async for delta in deltas:
                    begun = True
                    yield _encode(delta)
        except KVFerryError as error:
            if not begun:
                raise
            yield _encode(StreamError(code=error.code, message=error.message, retryable=error.retryable))

    return call, generate


class SimNodeClient:
    """`NodeClient` of the router, and of a node that asks others. Notes every decode leg in `legs`: request id -> what
    was asked for. `http`: asks by it, not by the nodes' methods."""

    def __init__(
        self, network: SimNetwork, source: SimProcess, nodes: dict[str, NodeService], http: SimHttp | None = None
    ) -> None:
        self._network = network
        self._source = source
        self._http = http
        self.nodes = nodes
        """By host."""
        self.legs: dict[str, GenerateRequest] = {}

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """See NodeClient."""
        asked = _Asked("POST", "/v1/prefill", PrefillResult, request)
        return await self._call(url, asked, lambda node: node.prefill(request), timeout_s)

    async def generate(
        self, url: str, request: GenerateRequest, reader: DeltaReader, *, first_s: float, gap_s: float
    ) -> None:
        """See NodeClient."""
        self.legs[request.request_id] = request
        name = _host(url)
        if self._http is not None:
            stream = self._decoded(name, request, first_s)
        else:
            stream = self._network.stream(self._source, name, lambda _: self.nodes[name].generate(request), first_s)
        try:
            await give(stream, reader, first_s=first_s, gap_s=gap_s)
        except (NetworkError, KVFerryError) as error:
            raise _translated(error) from error

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        asked = _Asked("POST", f"/v1/requests/{request_id}/end_handoff")
        await self._call(url, asked, lambda node: node.end_handoff(request_id), timeout_s, repeatable=True)

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        asked = _Asked("DELETE", f"/v1/requests/{request_id}")
        await self._call(url, asked, lambda node: node.abort(request_id), timeout_s, repeatable=True)

    async def compare(self, url: str, request: CompareRequest, *, timeout_s: float) -> CompareReply:
        """See `router.shadow.comparing.ComparingClient`."""
        asked = _Asked("POST", "/v1/compare", CompareReply, request)
        return await self._call(url, asked, lambda node: node.compare(request), timeout_s)

    async def promote(self, url: str, request: PromoteRequest, *, timeout_s: float) -> PromoteReply:
        """See `kvnode.tiers.peers.PromoteClient`."""
        asked = _Asked("POST", "/v1/promote", PromoteReply, request)
        return await self._call(url, asked, lambda node: node.promote(request), timeout_s)

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        """See NodeClient."""
        asked = _Asked("GET", "/v1/info", NodeReport)
        return await self._call(url, asked, lambda node: node.report(), timeout_s, repeatable=True)

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _call(
        self,
        url: str,
        asked: "_Asked",
        ask: Callable[[NodeService], Awaitable[T]],
        timeout_s: float,
        *,
        repeatable: bool = False,
    ) -> T:
        name = _host(url)
        how: dict[str, Any] = {"timeout_s": timeout_s, "repeatable": repeatable}
        try:
            if self._http is None:
                return await self._network.call(self._source, name, lambda _: ask(self.nodes[name]), **how)
            body = b"" if asked.body is None else _encode(asked.body)
            reply = await self._http.call(self._source, name, asked.method, asked.path, body, **how)
            return _decode(reply, asked.kind) if asked.kind is not None else None  # type: ignore[return-value]
        except msgspec.MsgspecError as error:
            raise NodeUnavailableError(f"{url} sent what cannot be read") from error
        except (NetworkError, KVFerryError) as error:
            raise _translated(error) from error

    async def _decoded(self, name: str, request: GenerateRequest, timeout_s: float) -> AsyncGenerator[TokenDelta, None]:
        assert self._http is not None
        frames = self._http.frames(self._source, name, "POST", "/v1/generate", _encode(request), silence_s=timeout_s)
        async with aclosing(frames):
            async for frame in frames:
                try:
                    said = msgspec.msgpack.decode(frame, type=StreamFrame)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise NodeUnavailableError("a frame cannot be read") from error
                if isinstance(said, StreamError):
                    raise error_from_code(said.code, said.message)
                yield said


class _Asked(NamedTuple):
    """Over HTTP. `kind`: of the answer, if it has a body."""

    method: str
    path: str
    kind: type[Any] | None = None
    body: msgspec.Struct | None = None


def _host(url: str) -> str:
    return url.removeprefix("http://").partition(":")[0]


def _translated(error: Exception) -> KVFerryError:
    if isinstance(error, LateError):
        return DeadlineExceededError(str(error))
    if isinstance(error, KVFerryError):
        return error_from_code(error.code, error.message)
    return NodeUnavailableError(str(error))


def _encode(value: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(value)


def _decode(raw: bytes, kind: type[T]) -> T:
    return msgspec.msgpack.decode(raw, type=kind)
