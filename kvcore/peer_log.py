"""Log lines about peers that misbehave, at a bounded rate: a peer must not be able to fill our disk with its faults.

Of one kind and one peer a line is written at once; those that follow within `every_s` are counted, and the next line
says how many. Usable from any thread.
"""

import logging
import threading
from dataclasses import dataclass

from kvcore.clock import Clock, SystemClock
from kvcore.telemetry import log_fields

_OTHERS = "others"


@dataclass(frozen=True, slots=True)
class PeerLogLimits:
    """Of one log."""

    every_s: float = 10.0
    """Between two lines of the same kind about the same peer."""
    max_peers: int = 64
    """Peers with lines of their own within that time; all further ones share lines."""


class PeerLog:
    """One a listener."""

    def __init__(
        self,
        logger: logging.Logger,
        limits: PeerLogLimits = PeerLogLimits(),
        clock: Clock | None = None,
    ) -> None:
        self._logger = logger
        self._limits = limits
        self._clock = clock or SystemClock()
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        """(kind, peer) -> (when it was last written, how many were not since), the earliest first."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<PeerLog of {len(self._said)} kinds and peers>"

    def say(self, level: int, event: str, kind: str, peer: str | None, **fields: object) -> None:
        """A line for `event`, unless one about this `peer` and this `kind` of fault was just written."""
        more = self.allows(kind, peer)
        if more is not None:
            log_fields(self._logger, level, event, **fields, peer=peer, more=more or None)

    def allows(self, kind: str, peer: str | None) -> int | None:
        """Whether a line may be written now: how many were not since the last one; None: not now."""
        with self._lock:
            now = self._clock.now()
            key = (kind, peer or "")
            if key not in self._said and len(self._said) >= self._limits.max_peers:
                self._forget(now)
                if len(self._said) >= self._limits.max_peers:
                    key = (kind, _OTHERS)
            at, more = self._said.get(key, (None, 0))
            if at is not None and now - at < self._limits.every_s:
                self._said[key] = at, more + 1
                return None
            self._said.pop(key, None)
            self._said[key] = now, 0
            return more

    def _forget(self, now: float) -> None:
        while self._said:
            key, (at, _) = next(iter(self._said.items()))
            if now - at < self._limits.every_s:
                return
            del self._said[key]
