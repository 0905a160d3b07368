"""Requests that come while no node can be used: they wait for the first that is back, and are told so.

Owns who waits and for how long. Bounded in number, in tokens of prompts and in time. Invariant: a request leaves when a
node is up, when its time is up, when its client leaves, and when this router stops.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from kvcore.clock import Clock
from kvcore.config.schema import RouterConfig
from kvcore.errors import NodeUnavailableError
from kvcore.telemetry import log_fields
from kvcore.types import Role
from router.admission.limits import AdmissionLimits
from router.nodes.cluster import Cluster

_log = logging.getLogger("router")
Tell = Callable[[], Awaitable[None]]
"""Tells the client that its request waits."""


class NoNodeWait:
    """One a router. `patience_s`: as long as a node may take to start. `max_waiting`: requests."""

    def __init__(
        self,
        cluster: Cluster,
        clock: Clock,
        *,
        patience_s: float,
        max_waiting: int,
        stopping: Callable[[], bool],
        limits: AdmissionLimits = AdmissionLimits(),
    ) -> None:
        self._cluster, self._clock, self._limits = cluster, clock, limits
        self._patience_s, self._max_waiting, self._stopping = patience_s, max_waiting, stopping
        self._waiting: set[asyncio.Future[None]] = set()
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        return f"<NoNodeWait of {len(self)} requests, {self._tokens} tokens>"

    def go_by(self, config: RouterConfig) -> None:
        """So many may wait from now on."""
        self._max_waiting = config.max_waiting

    async def until_up(self, prompts: Sequence[Sequence[int]], tell: Tell) -> None:
        """Returns at once if a node is up, or if none may come up by itself; else when one is, or when time is up.
        Whoever goes on then is told what is wrong. Raises NodeUnavailableError where too many wait."""
        if self._is_over():
            return
        tokens = sum(map(len, prompts))
        if len(self) >= self._max_waiting or self._tokens + tokens > self._limits.waiting_tokens:
            why = self._cluster.why_no_decoder()
            raise NodeUnavailableError(f"{why}; {len(self)} requests wait for one already, as many as may")
        if not self._waiting:
            log_fields(_log, logging.WARNING, "no_node_up", why=self._cluster.why_no_decoder())
        until = self._clock.now() + self._patience_s
        self._tokens += tokens
        try:
            while not self._is_over() and (left_s := until - self._clock.now()) > 0:
                await self._turn(min(left_s, self._limits.tell_s))
                if not self._is_over():
                    await tell()
        finally:
            self._tokens -= tokens

    def look(self) -> None:
        """Nodes were probed."""
        if self._waiting and self._is_over():
            for turn in self._waiting:
                if not turn.done():
                    turn.set_result(None)

    async def _turn(self, timeout_s: float) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.add(turn)
        try:
            await asyncio.wait([turn], timeout=timeout_s)
        finally:
            self._waiting.discard(turn)

    def _is_over(self) -> bool:
        return self._stopping() or not none_is_up_yet(self._cluster)


def none_is_up_yet(cluster: Cluster) -> bool:
    """Whether no node is up, and waiting for one is of use: not if none that there is fits, or all are drained by
    order."""
    view = cluster.view()
    if view.decoders or view.prefillers:
        return False
    engines = [node for node in cluster.nodes.values() if node.role is not Role.STORE]
    return not all(node.unfit is not None or cluster.is_drained(node.id) for node in engines)
