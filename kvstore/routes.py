"""How far segments are, and which to leave alone for a while.

Owns the pauses after failures, and says of forged frames that there were some; no I/O. Invariant: a segment that failed
is tried again after its pause, which grows while it goes on failing, so that a dead peer costs one caller its deadline
and not all.
"""

import logging

from kvcore.clock import Clock
from kvcore.errors import PeerUnreachableError, TransferError, TransferForgedError, TransferTimeoutError
from kvcore.peer_log import PeerLog
from kvcore.types import Segment
from kvstore.counters import Count, StoreCounters
from kvstore.limits import StoreLimits
from transfer.base import TransferEngine, transport_for

_log = logging.getLogger("kvstore")


class Routes:
    """`node_id`'s own segment is the nearest of all, then those of `host_id` (None: not known)."""

    def __init__(
        self,
        transfer: TransferEngine,
        node_id: str,
        host_id: str | None,
        *,
        clock: Clock,
        limits: StoreLimits,
        counters: StoreCounters,
    ) -> None:
        self._transfer = transfer
        self._node_id = node_id
        self._host_id = host_id
        self._clock = clock
        self._limits = limits
        self._counters = counters
        self._peer_log = PeerLog(_log, clock=clock)
        self._pauses: dict[str, tuple[float, float]] = {}
        """Segment id -> (end, length) of the pause."""

    def open(self, segment: Segment) -> bool:
        """Whether to try the segment now."""
        pause = self._pauses.get(segment.id)
        return (pause is None or pause[0] <= self._clock.now()) and self._transfer.reaches(segment)

    def transport(self, segment: Segment) -> str:
        """The name under which bytes to or from the segment are counted."""
        return transport_for(self._transfer, segment)

    def rank(self, segment: Segment) -> int | None:
        """The segment's `distance` if it is `open` for reading now, else None."""
        return self.distance(segment) if self.open(segment) else None

    def distance(self, segment: Segment) -> int:
        """0 the own node, 1 the own host, 2 elsewhere."""
        if segment.node_id == self._node_id:
            return 0
        return 1 if segment.host_id == self._host_id else 2

    def report(self, segment: Segment, error: TransferError | None) -> None:
        """What became of an operation. Only silence and refusal pause a segment: other errors cost no time."""
        if isinstance(error, TransferForgedError):
            self._counters.add(Count.FRAMES_FORGED)
            self._peer_log.say(logging.WARNING, "frame_forged", "forged", segment.id, error=error.message)
        if not isinstance(error, PeerUnreachableError | TransferTimeoutError):
            self._pauses.pop(segment.id, None)
            return
        end, length = self._pauses.pop(segment.id, (0.0, 0.0))
        now = self._clock.now()
        if now >= end:  # several operations of one batch count once
            length = min(self._limits.longest_pause_s, length * 2 or self._limits.first_pause_s)
            end = now + length
        while len(self._pauses) >= self._limits.max_paused_segments:
            del self._pauses[next(iter(self._pauses))]
        self._pauses[segment.id] = (end, length)
