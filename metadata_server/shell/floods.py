"""Nodes that ask for more than any node needs: what they register, reserve and wait for is counted. Told the time.

A registration is the one small request that makes much work for all: what lay in the node's segments is forgotten, and
every subscriber hears of it and of what is told anew. A reservation evicts what others stored, and is committed: each
chunk is two events for every subscriber. Of what one node reserves, beyond a rate, nothing is granted.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from msgspec.structs import replace

from kvcore.errors import OverloadedError
from kvcore.peer_log import PeerLog
from kvcore.telemetry import log_fields
from metadata_server.limits import ServerLimits
from metadata_server.messages import ReserveOutcome, ReserveReply, ReserveRequest, ReserveStatus, WaitRequest

_logger = logging.getLogger("metadata_server")
_Key = TypeVar("_Key", str, bytes)
_FULL = ReserveOutcome(status=ReserveStatus.FULL)

Reserve = Callable[[ReserveRequest, float], ReserveReply]


class NodeFloods:
    """Of one server. Nodes are told apart by their ids; whoever names none is one with all who name none."""

    def __init__(self, limits: ServerLimits, counts: Counter[str], said: PeerLog) -> None:
        self._limits, self.counts, self._said = limits, counts, said
        self._registrations = _Paces(limits.most_registrations, limits.registrations_per_s, limits.max_registering)
        self._chunks = _Paces(limits.most_reserved, limits.reserved_per_s, limits.max_registering)
        self._waits: Counter[str] = Counter()
        self._waits_of: Counter[bytes] = Counter()
        """By tenant."""
        self.num_waits = 0
        """Long polls that wait, of all nodes."""

    def __repr__(self) -> str:
        return f"<NodeFloods {len(self._registrations)} nodes registered lately, {self.num_waits} waits>"

    def check_register(self, node_id: str, now: float) -> None:
        """Raises OverloadedError for one more than a node may send."""
        limits = self._limits
        if self._registrations.left(node_id, now) < 1.0:
            self.counts["registrations_refused"] += 1
            self._say(node_id, "registrations")
            raise OverloadedError(
                f"node {node_id} has registered {limits.most_registrations} times in a row, and may go on with "
                f"{limits.registrations_per_s:g} a second: look into its log for why, or who uses its name"
            )

    def registered(self, node_id: str, now: float) -> None:
        """One counts that was taken: a second process that is refused takes nothing from the first."""
        self._registrations.take(node_id, 1, now)

    def paced(self, reserve: Reserve) -> Reserve:
        """The call, of which each node gets no more than its share of the server's time and of everybody's events."""

        def reserve_paced(request: ReserveRequest, now: float) -> ReserveReply:
            node_id, wanted = request.node_id, len(request.items)
            may = min(wanted, int(self._chunks.left(node_id, now)))
            if may == wanted:
                reply = reserve(request, now)
            else:
                self.counts["declined_too_fast"] += wanted - may
                self._say(node_id, "reservations")
                reply = reserve(replace(request, items=request.items[:may]), now) if may else ReserveReply(outcomes=[])
                reply = replace(reply, outcomes=[*reply.outcomes, *[_FULL] * (wanted - may)])
            if granted := sum(outcome.status is ReserveStatus.GRANTED for outcome in reply.outcomes):
                self._chunks.take(node_id, granted, now)
            return reply

        return reserve_paced

    def may_wait(self, request: WaitRequest) -> bool:
        """Whether one more long poll of this node, for this tenant, may wait."""
        limits = self._limits
        if request.owner and self._waits_of[request.owner] >= limits.max_waiters_per_owner:
            return False
        return self.num_waits < limits.max_waiters and self._waits[request.node_id] < limits.max_waiters_per_node

    @contextmanager
    def waiting(self, request: WaitRequest) -> Iterator[None]:
        """While it waits."""
        self.num_waits += 1
        self._waits[request.node_id] += 1
        if request.owner:
            self._waits_of[request.owner] += 1
        try:
            yield
        finally:
            self.num_waits -= 1
            _one_less(self._waits, request.node_id)
            if request.owner:
                _one_less(self._waits_of, request.owner)

    def _say(self, node_id: str, what: str) -> None:
        if self._said.allows(f"flood of {what}", node_id) is not None:
            log_fields(_logger, logging.WARNING, "node_floods", node=node_id, what=what)


class _Paces:
    """How many more of something each of many may have: so many in a row, and then so many a second."""

    def __init__(self, most: float, per_s: float, max_known: int) -> None:
        self._most, self._per_s, self._max_known = float(most), per_s, max_known
        self._known: dict[str, tuple[float, float]] = {}
        """So many more, as of then; who took last is last."""

    def __len__(self) -> int:
        return len(self._known)

    def left(self, who: str, now: float) -> float:
        """As of `now`."""
        left, at = self._known.get(who, (self._most, now))
        return min(self._most, left + max(0.0, now - at) * self._per_s)

    def take(self, who: str, count: int, now: float) -> None:
        """So many less."""
        left = self.left(who, now) - count
        self._known.pop(who, None)
        if len(self._known) >= self._max_known:
            del self._known[next(iter(self._known))]
        self._known[who] = left, now


def _one_less(counts: Counter[_Key], key: _Key) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
