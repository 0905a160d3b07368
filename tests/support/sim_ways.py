"""The production protocols over the simulated network: metadata calls, the event stream, nodes' control calls."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from support.sim_network import LateError, NetworkError, SimNetwork, SimProcess

from kvcore.errors import (
    DeadlineExceededError,
    KVFerryError,
    MetadataProtocolError,
    MetadataUnavailableError,
    NodeUnavailableError,
    error_from_code,
)
from metadata_server.core import MetadataCore
from nodeapi.messages import (
    GenerateRequest,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    PromoteReply,
    PromoteRequest,
    TokenDelta,
)

T = TypeVar("T")
METADATA = "metadata"
SILENCE_S = 5.0
_REPEATABLE = frozenset(
    [
        "/v1/nodes/heartbeat",
        "/v1/nodes/register",
        "/v1/objects/commit",
        "/v1/objects/abort",
        "/v1/leases/release",
        "/v1/objects/quarantine",
    ]
)


class SimMetadataTransport:
    """`MetadataTransport` of one process. `core` gives the core of now of the server on `host`."""

    def __init__(
        self, network: SimNetwork, source: SimProcess, core: Callable[[], MetadataCore], host: str = METADATA
    ) -> None:
        self._network = network
        self._source = source
        self._core = core
        self._host = host

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        """See MetadataTransport."""
        try:
            return await self._network.call(
                self._source,
                self._host,
                lambda _: self._core().dispatch(path, body),
                timeout_s=timeout_s,
                repeatable=path in _REPEATABLE,
            )
        except NetworkError as error:
            raise MetadataUnavailableError(str(error)) from error
        except MetadataProtocolError:
            raise
        except KVFerryError as error:
            raise MetadataUnavailableError(error.message) from error

    async def aclose(self) -> None:
        """Nothing is held."""


class SimEventSource:
    """`EventSource` of one process, as SimMetadataTransport."""

    def __init__(
        self, network: SimNetwork, source: SimProcess, core: Callable[[], MetadataCore], host: str = METADATA
    ) -> None:
        self._network = network
        self._source = source
        self._core = core
        self._host = host

    async def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        """See EventSource."""

        def serve(_: SimProcess) -> AsyncGenerator[bytes, None]:
            return self._core().events(epoch, from_seq)

        stream = self._network.stream(self._source, self._host, serve, SILENCE_S)
        try:
            async for batch in stream:
                yield batch
        except NetworkError as error:
            raise MetadataUnavailableError(str(error)) from error
        except KVFerryError as error:
            raise MetadataUnavailableError(error.message) from error
        finally:
            await stream.aclose()

    async def aclose(self) -> None:
        """Nothing is held."""


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

    async def promote(self, request: PromoteRequest) -> PromoteReply:
        """As the control API."""
        raise NotImplementedError

    async def abort(self, request_id: str) -> None:
        """As the control API."""
        raise NotImplementedError

    async def report(self) -> NodeReport:
        """As the control API."""
        raise NotImplementedError


class SimNodeClient:
    """`NodeClient` of the router, and of a node that asks others. Notes every decode leg in `legs`: request id -> what
    was asked for."""

    def __init__(self, network: SimNetwork, source: SimProcess, nodes: dict[str, NodeService]) -> None:
        self._network = network
        self._source = source
        self.nodes = nodes
        """By host."""
        self.legs: dict[str, GenerateRequest] = {}

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """See NodeClient."""
        return await self._call(url, lambda node: node.prefill(request), timeout_s)

    async def generate(
        self, url: str, request: GenerateRequest, *, timeout_s: float
    ) -> AsyncGenerator[TokenDelta, None]:
        """See NodeClient."""
        self.legs[request.request_id] = request
        name = _host(url)
        stream = self._network.stream(self._source, name, lambda _: self.nodes[name].generate(request), timeout_s)
        try:
            async for delta in stream:
                yield delta
        except (NetworkError, KVFerryError) as error:
            raise _translated(error) from error
        finally:
            await stream.aclose()

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        await self._call(url, lambda node: node.end_handoff(request_id), timeout_s, repeatable=True)

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """See NodeClient."""
        await self._call(url, lambda node: node.abort(request_id), timeout_s, repeatable=True)

    async def promote(self, url: str, request: PromoteRequest, *, timeout_s: float) -> PromoteReply:
        """See `kvnode.tiers.peers.PromoteClient`."""
        return await self._call(url, lambda node: node.promote(request), timeout_s)

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        """See NodeClient."""
        return await self._call(url, lambda node: node.report(), timeout_s, repeatable=True)

    async def aclose(self) -> None:
        """Nothing is held."""

    async def _call(
        self, url: str, ask: Callable[[NodeService], Awaitable[T]], timeout_s: float, *, repeatable: bool = False
    ) -> T:
        name = _host(url)
        try:
            return await self._network.call(
                self._source, name, lambda _: ask(self.nodes[name]), timeout_s=timeout_s, repeatable=repeatable
            )
        except (NetworkError, KVFerryError) as error:
            raise _translated(error) from error


def _host(url: str) -> str:
    return url.removeprefix("http://").partition(":")[0]


def _translated(error: Exception) -> KVFerryError:
    if isinstance(error, LateError):
        return DeadlineExceededError(str(error))
    if isinstance(error, KVFerryError):
        return error_from_code(error.code, error.message)
    return NodeUnavailableError(str(error))
