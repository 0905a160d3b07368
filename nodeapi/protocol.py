"""The calls that a router makes to a node. `nodeapi.client` makes them over HTTP, the simulation without."""

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from nodeapi.messages import GenerateRequest, NodeReport, PrefillRequest, PrefillResult, TokenDelta

TakeDelta = Callable[[TokenDelta], bool]
"""Does with a delta what is to be done with it, at once. False: it has done nothing, and is given it as any other."""


class NodeClient(Protocol):
    """Calls to nodes by their control URL. All raise errors of kvcore.errors only; `NodeUnavailableError` when the node
    cannot be reached or breaks off. Cancelling a call drops its connection at once."""

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """Run a prefill leg. DeadlineExceededError after `timeout_s`."""
        ...

    def generate(
        self, url: str, request: GenerateRequest, *, timeout_s: float, take: TakeDelta | None = None
    ) -> AsyncGenerator[TokenDelta]:
        """Run a decode leg. Ends normally when the node has ended its stream; the caller counts finish reasons.
        DeadlineExceededError when a single delta takes longer than `timeout_s`.

        A delta that comes while the next one is waited for may be given to `take`; it is yielded only if that does not
        take it. What `take` raises is raised where the next one is waited for."""
        ...

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """Tell a decode leg to stop waiting for chunks."""
        ...

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        """End a leg. Unknown ids are no error."""
        ...

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        """The node's report. NodeVersionError where the node speaks no version that we do."""
        ...

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        ...
