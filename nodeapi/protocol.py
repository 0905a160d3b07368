"""The calls that a router makes to a node. `nodeapi.client` makes them over HTTP, the simulation without."""

from typing import Protocol

from nodeapi.messages import GenerateRequest, NodeReport, PrefillRequest, PrefillResult, TokenDelta


class DeltaReader(Protocol):
    """Reads what a decode leg says, straight from its connection: no task is woken for a delta."""

    def take(self, delta: TokenDelta) -> bool:
        """The next one. False: `ready` is awaited before the one after it. What it raises ends the call."""
        ...

    async def ready(self) -> bool:
        """Returns once it takes more. False: it wants nothing more, and the call ends."""
        ...


class NodeClient(Protocol):
    """Calls to nodes by their control URL. All raise errors of kvcore.errors only; `NodeUnavailableError` when the node
    cannot be reached or breaks off. Cancelling a call drops its connection at once."""

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        """Run a prefill leg. DeadlineExceededError after `timeout_s`."""
        ...

    async def generate(
        self, url: str, request: GenerateRequest, reader: DeltaReader, *, first_s: float, gap_s: float
    ) -> None:
        """Run a decode leg, and have `reader` take what it says. Returns when the node has ended its stream, or the
        reader wants no more, who counts finish reasons. DeadlineExceededError when the first delta takes longer than
        `first_s`, or a later one than `gap_s` while the reader takes more."""
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
