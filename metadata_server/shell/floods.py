"""Nodes that ask for more than any node needs: their registrations and their waits are counted. Told the time.

A registration is the one small request that makes much work for all: what lay in the node's segments is forgotten, and
every subscriber hears of it and of what is told anew.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvcore.errors import OverloadedError
from kvcore.peer_log import PeerLog
from kvcore.telemetry import log_fields
from metadata_server.limits import ServerLimits

_logger = logging.getLogger("metadata_server")


class NodeFloods:
    """Of one server. Nodes are told apart by their ids; whoever names none is one with all who name none."""

    def __init__(self, limits: ServerLimits, counts: Counter[str], said: PeerLog) -> None:
        self._limits, self._counts, self._said = limits, counts, said
        self._registrations: dict[str, tuple[float, float]] = {}
        """By node: so many more may come, as of then; who registered last is last."""
        self._waits: Counter[str] = Counter()
        self.num_waits = 0
        """Long polls that wait, of all nodes."""

    def __repr__(self) -> str:
        return f"<NodeFloods {len(self._registrations)} nodes registered lately, {self.num_waits} waits>"

    def check_register(self, node_id: str, now: float) -> None:
        """Raises OverloadedError for one more than a node may send."""
        limits = self._limits
        if self._left(node_id, now) < 1.0:
            self._counts["registrations_refused"] += 1
            if self._said.allows("flood", node_id) is not None:
                log_fields(_logger, logging.WARNING, "node_floods", node=node_id)
            raise OverloadedError(
                f"node {node_id} has registered {limits.most_registrations} times in a row, and may go on with "
                f"{limits.registrations_per_s:g} a second: look into its log for why, or who uses its name"
            )

    def registered(self, node_id: str, now: float) -> None:
        """One counts that was taken: a second process that is refused takes nothing from the first."""
        left = self._left(node_id, now) - 1.0
        self._registrations.pop(node_id, None)
        if len(self._registrations) >= self._limits.max_registering:
            del self._registrations[next(iter(self._registrations))]
        self._registrations[node_id] = left, now

    def may_wait(self, node_id: str) -> bool:
        """Whether one more long poll of this node may wait."""
        limits = self._limits
        return self.num_waits < limits.max_waiters and self._waits[node_id] < limits.max_waiters_per_node

    @contextmanager
    def waiting(self, node_id: str) -> Iterator[None]:
        """While one of them waits."""
        self._waits[node_id] += 1
        self.num_waits += 1
        try:
            yield
        finally:
            self.num_waits -= 1
            self._waits[node_id] -= 1
            if not self._waits[node_id]:
                del self._waits[node_id]

    def _left(self, node_id: str, now: float) -> float:
        most = float(self._limits.most_registrations)
        left, at = self._registrations.get(node_id, (most, now))
        return min(most, left + max(0.0, now - at) * self._limits.registrations_per_s)
