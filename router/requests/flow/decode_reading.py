"""What one decode leg says, delta by delta: noted in its record, told to the request, and counted.

Owns what is known of a leg while it is read. Deltas that add nothing but tokens are taken straight from the connection
(`take`), without waking the leg's task; all others are read by that task (`read`). Both do the same.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from kvcore.errors import NodeUnavailableError
from kvcore.step_timeout import StepTimeout
from nodeapi.messages import FinishReason, LegInfo, TokenDelta
from router.nodes.stall_watch import WatchedLeg

MAX_AT_ONCE = 32
"""Deltas that are read before others have their turn: a node may send thousands at once, of 0.1 ms each where there are
logprobs."""


@dataclass(slots=True)
class DecodeReading:
    """Of one leg, made by its task. `missing`: completions whose end has not come. `silence`: ends the task's block
    when nothing is heard for `stall_s`. `tell(delta)`: whether more is wanted. `note`: called with the leg's info.
    `begun(computed)`: with its first delta."""

    node: str
    missing: int
    silence: StepTimeout
    stall_s: float
    drained: asyncio.Event
    watched: WatchedLeg | None
    tell: Callable[[TokenDelta], bool]
    note: Callable[[LegInfo], None]
    now: Callable[[], float]
    spoke_at: float | None = None
    """When its first delta came."""
    tokens: int = 0
    _task: "asyncio.Task[object] | None" = field(default_factory=asyncio.current_task)

    def read(self, delta: TokenDelta) -> bool:
        """Whether more is wanted. Raises NodeUnavailableError where the node gave up, and what `tell` raises."""
        if (watched := self.watched) is not None:
            if self.spoke_at is None:
                watched.first(watched.computes if delta.info is None else delta.info.computed_tokens)
            else:
                watched.heard()
        if self.spoke_at is None:
            self.spoke_at = self.now()
        self.tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.missing -= 1
        if delta.info is not None:
            self.note(delta.info)
        if delta.finish_reason is FinishReason.ABORT:
            raise NodeUnavailableError(f"node {self.node} gave the request up")
        wanted = self.tell(delta)
        self.silence.start(self.stall_s)
        return wanted

    def take(self, delta: TokenDelta) -> bool:
        """See nodeapi.protocol.TakeDelta."""
        is_plain = delta.finish_reason is None and delta.info is None and delta.prompt_logprobs is None
        if not is_plain or self.spoke_at is None or not self.drained.is_set() or self._task is None:
            return False
        if not self.read(delta):  # nobody wants the rest
            self._task.cancel()
            self._task = None
        return True

    async def read_all(self, deltas: AsyncIterator[TokenDelta]) -> bool:
        """Those that are not taken straight, until no more are wanted. False: they ended before."""
        num = 0
        async for delta in deltas:
            if self._task is None:  # `take` has found that nobody wants the rest, while this task ran
                return True
            wanted = self.read(delta)
            if not (wanted and self.missing):
                return True
            if not self.drained.is_set():
                await self._until_drained()
            num += 1
            if not num % MAX_AT_ONCE or delta.prompt_logprobs is not None:  # naming those tokens takes a millisecond
                await asyncio.sleep(0)
        return self._task is None

    async def _until_drained(self) -> None:
        """Until the client has read enough. What the node is silent for meanwhile is not its fault."""
        self.silence.stop()
        if (watched := self.watched) is not None:
            watched.paused = True
        await self.drained.wait()
        if watched is not None:
            watched.paused, watched.quiet_s = False, 0.0
        self.silence.start(self.stall_s)
