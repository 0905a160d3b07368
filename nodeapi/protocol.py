"""A node as the router sees it: the calls it makes. `node_client` makes them over HTTP, a simulation by itself."""

from collections.abc import AsyncGenerator
from typing import Protocol

from nodeapi.messages import GenerateRequest, NodeReport, PrefillRequest, PrefillResult, TokenDelta


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
        """The node's report. NodeVersionError where it speaks a protocol that we do not."""
        ...

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        ...
