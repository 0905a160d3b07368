"""What one decode leg says, delta by delta: noted in its record, told to the request, and counted.

Owns what is known of a leg while it is read. Deltas are taken straight from the connection, without waking the leg's
task.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

from kvcore.errors import KVFerryError, NodeUnavailableError
from nodeapi.messages import FinishReason, LegInfo, TokenDelta
from router.nodes.stall_watch import WatchedLeg
from router.requests.events import LegEvent
from router.requests.flow.outputs import Outputs
from router.requests.ledger import RequestMachine
from router.requests.records import LegRecord


class LegListener(Protocol):
    """The request, as its legs see it."""

    @property
    def machine(self) -> RequestMachine:
        """Where it is."""
        ...

    def tell(self, event: LegEvent) -> object:
        """Something happened to a leg."""
        ...

    def take(self, leg: str, delta: TokenDelta) -> bool:
        """A decode leg sent something. Whether more of it is wanted. Raises what is wrong with it."""
        ...

    def stalled(self, leg: LegRecord, error: KVFerryError) -> None:
        """A leg was silent for longer than its node should ever take."""
        ...


class DecodeReading:
    """The DeltaReader of one leg. `missing`: completions whose end has not come. `note`: called with the leg's info.
    `now`: the clock's."""

    def __init__(
        self,
        leg: LegRecord,
        missing: int,
        outputs: Outputs,
        watched: WatchedLeg | None,
        *,
        listener: LegListener,
        note: Callable[[LegInfo], None],
        now: Callable[[], float],
    ) -> None:
        self._leg, self.missing, self._outputs, self._watched = leg, missing, outputs, watched
        self._listener, self._note, self._now = listener, note, now
        self.spoke_at: float | None = None
        """When its first delta came."""
        self.tokens = 0
        self.done = False
        """Nothing more is wanted of it."""

    def __repr__(self) -> str:
        return f"<DecodeReading {self._leg.id}: {self.tokens} tokens, {self.missing} unfinished>"

    def take(self, delta: TokenDelta) -> bool:
        """See nodeapi.protocol.DeltaReader. Raises NodeUnavailableError where the node gave up, and what the listener
        does."""
        watched, info = self._watched, delta.info
        if self.spoke_at is None:
            self.spoke_at = self._now()
            if watched is not None:
                watched.first(watched.computes if info is None else info.computed_tokens)
        elif watched is not None:
            watched.heard()
        self.tokens += len(delta.token_ids)
        if info is not None:
            self._note(info)
        if delta.finish_reason is not None:
            self.missing -= 1
            if delta.finish_reason is FinishReason.ABORT:
                raise NodeUnavailableError(f"node {self._leg.node} gave the request up")
        self.done = not (self._listener.take(self._leg.id, delta) and self.missing)
        return not (self.done or self._outputs.is_full or delta.prompt_logprobs is not None)

    async def ready(self) -> bool:
        """See DeltaReader. What the node is silent for while the client reads is not its fault."""
        if self.done:
            return False
        if not self._outputs.is_full:
            await asyncio.sleep(0)  # naming a prompt's tokens takes a millisecond
            return True
        if (watched := self._watched) is not None:
            watched.paused = True
        await self._outputs.room()
        if watched is not None:
            watched.paused, watched.quiet_s = False, 0.0
        return True
