"""A node as the router sees it: the calls it makes, and the report that it reads. `node_client` makes them over HTTP."""

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from engines.base import EngineInfo, EngineStats, GenerateRequest, PrefillRequest, PrefillResult, TokenDelta
from kvcore.types import NodeInfo, Segment


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What GET /v1/info says, as far as the router reads it; further fields are ignored."""

    node: NodeInfo
    engine: EngineInfo | None = None
    stats: EngineStats | None = None
    segments: list[Segment] = []
    draining: bool = False


class NodeClient(Protocol):
    """Calls to nodes by their control URL. All raise errors of kvcore.errors only; `NodeUnavailableError` when the node
    cannot be reached or breaks off. Cancelling a call drops its connection at once."""

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """Run a prefill leg. DeadlineExceededError after `timeout_s`."""
        ...

    def generate(self, url: str, request: GenerateRequest, *, timeout_s: float) -> AsyncGenerator[TokenDelta]:
        """Run a decode leg. Ends normally only after the node ended its stream; the caller counts finish reasons. No
        single delta may take longer than `timeout_s`, else DeadlineExceededError."""
        ...

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """Tell a decode leg to stop waiting for chunks."""
        ...

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """End a leg. Unknown ids are no error."""
        ...

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        """The node's report."""
        ...

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        ...
