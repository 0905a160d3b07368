"""Which transport carries bytes to which segment, and which segments to leave alone for a while.

Owns the pauses after failures; no I/O. Invariant: a segment that failed is tried again after its pause, which grows
while it goes on failing, so that a dead peer costs one caller its deadline and not all.
"""

from collections.abc import Sequence

from kvcore.clock import Clock
from kvcore.errors import PeerUnreachableError, TransferError, TransferTimeoutError
from kvcore.types import Segment
from transfer.base import TransferEngine

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_MAX_PAUSES = 1024


class Routes:
    """`transfers` in order of preference; `node_id`'s own segment is the nearest of all."""

    def __init__(self, transfers: Sequence[TransferEngine], node_id: str, clock: Clock) -> None:
        self._transfers = tuple(transfers)
        self._node_id = node_id
        self._clock = clock
        self._pauses: dict[tuple[str, str], tuple[float, float]] = {}
        """(transport, segment id) -> (end, length) of the pause."""

    def to(self, segment: Segment) -> list[TransferEngine]:
        """Transports to try for `segment`, best first; empty: it cannot be reached now."""
        now = self._clock.now()
        return [
            transfer
            for transfer in self._transfers
            if transfer.reaches(segment) and self._pauses.get((transfer.kind, segment.id), (0.0, 0.0))[0] <= now
        ]

    def distance(self, segment: Segment, transfer: TransferEngine) -> tuple[bool, int]:
        """Sort key: the own node before others, then the order of `transfers` (shm before tcp)."""
        return segment.node_id != self._node_id, self._transfers.index(transfer)

    def report(self, segment: Segment, transfer: TransferEngine, error: TransferError | None) -> None:
        """What became of an operation. Only silence and refusal pause a segment: other errors cost no time."""
        place = (transfer.kind, segment.id)
        if not isinstance(error, PeerUnreachableError | TransferTimeoutError):
            self._pauses.pop(place, None)
            return
        end, length = self._pauses.pop(place, (0.0, 0.0))
        now = self._clock.now()
        if now >= end:  # several operations of one batch count once
            length = min(_LONGEST_PAUSE_S, length * 2 or _FIRST_PAUSE_S)
            end = now + length
        while len(self._pauses) >= _MAX_PAUSES:
            del self._pauses[next(iter(self._pauses))]
        self._pauses[place] = (end, length)
