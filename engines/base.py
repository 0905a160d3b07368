"""The protocol between a node and its engine. Tokens in, tokens out: text is the router's.

The messages are `nodeapi.messages`.
"""

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Protocol, Self

from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.messages import (
    EngineInfo,
    EngineStats,
    GenerateRequest,
    PrefillRequest,
    PrefillResult,
    TokenDelta,
)


class Engine(Protocol):
    """An engine with its connector to the store. Entering it loads the model; leaving it aborts everything."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def info(self) -> EngineInfo:
        """Known once entered."""
        ...

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """Returns when the chunks are committed or were declined. Raises DeadlineExceededError, OverloadedError,
        ContextLengthError, EngineError. Cancellation aborts the request and frees its blocks at once."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """Deltas of all indices, interleaved. Closing it (`aclose`) aborts the request. Raises as `prefill`."""
        ...

    async def compare(self, request: CompareRequest) -> CompareReply:
        """Run a prompt in full and as it would be reused. Raises as `prefill`, OverloadedError while there is other
        work, InvalidRequestError where the engine cannot."""
        ...

    async def end_handoff(self, request_id: str) -> None:
        """The prefill leg has ended: take what is in the store now and stop waiting. Unknown ids are ignored."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request; its stream ends with FinishReason.ABORT. Unknown ids are ignored."""
        ...

    async def stats(self) -> EngineStats:
        """A fresh sample."""
        ...
