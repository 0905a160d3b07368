"""How long legs have been silent. One over its limit makes its node suspected, and all legs there are to go elsewhere.

Counts its own looks, so that a pause of this process accuses nobody. A node that is seen to do anything meanwhile, for
whomever, is busy, not stalled. Where a leg goes is its request's matter (`router.requests.ledger`).
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from kvcore.config.schema import RouterConfig
from kvcore.errors import NodeStalledError
from kvcore.telemetry import log_fields
from router.nodes.known import KnownNode
from router.nodes.limits import NodeHealthLimits

_log = logging.getLogger("router")


class WatchedLeg(msgspec.Struct, eq=False):
    """One leg under way. `computes`: prompt tokens before its first token, or before its answer. `patience`: its limits
    are so many times the usual, after stalls of the request's legs of this kind. `waits`: whether it rightly waits for
    another node. `move(error)`: give it up, if some other node can take it over."""

    id: str
    node: KnownNode
    started_at: float
    computes: int
    patience: float
    waits: Callable[[], bool]
    move: Callable[[NodeStalledError], None]
    is_prefill: bool = False
    paused: bool = False
    """Nobody reads what it has said: its client is slow."""
    began: bool = False
    quiet_s: float = 0.0
    longest_s: float = 0.0
    """Silence between two tokens."""
    again_s: float = 0.0
    """Of silence, until it is given up again."""

    def heard(self) -> None:
        """It has said something."""
        self.quiet_s = self.node.pace.quiet_s = 0.0

    def first(self, computed: int) -> None:
        """Its first token, or its answer, is here; so many tokens were computed for it."""
        self.node.pace.began(self.quiet_s, computed)
        self.began, self.again_s = True, 0.0
        self.heard()

    def ended_well(self) -> None:
        """It has said all."""
        if self.is_prefill:
            self.node.pace.kept()
        elif self.began:
            self.node.pace.ended(self.longest_s)

    def limit(self, config: RouterConfig) -> tuple[str, float]:
        """(Which limit it is under now, seconds.)"""
        pace = self.node.pace
        if self.began:
            return "token", self.patience * pace.gap_limit_s(config.stall_gap_s)
        what = "answer to a prefill" if self.is_prefill else "first token"
        return what, self.patience * pace.first_limit_s(config.stall_first_s, self.computes)


class StallWatch:
    """Of one router."""

    def __init__(self, config: RouterConfig, limits: NodeHealthLimits, now: Callable[[], float]) -> None:
        self._limits, self._now = limits, now
        self.go_by(config)
        self._legs: dict[str, WatchedLeg] = {}
        self.on_suspect: list[Callable[[KnownNode], None]] = []
        """Called with a node that is not trusted any more."""

    def __repr__(self) -> str:
        return f"<StallWatch of {len(self._legs)} legs>"

    def go_by(self, config: RouterConfig) -> None:
        """These are the limits from now on."""
        self._config, self._shortest_s = config, min(config.stall_gap_s, config.stall_first_s)

    def begin(self, leg: WatchedLeg) -> WatchedLeg:
        """It is under way from here on."""
        self._legs[leg.id] = leg
        return leg

    def end(self, leg: str) -> None:
        """It is over, if it was under way."""
        self._legs.pop(leg, None)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._limits.look_s)
            self.look(self._limits.look_s)

    def look(self, step_s: float) -> None:
        """So much time has passed since the last look."""
        judged = [leg for leg in self._legs.values() if not (leg.paused or leg.waits())]
        nodes = {leg.node.id: leg.node for leg in judged}
        for node in nodes.values():
            if node.trust.suspected and node.pace.quiet_s == 0.0:
                works(node, self._now())
            node.pace.quiet_s += step_s
        for leg in sorted(judged, key=lambda leg: (leg.started_at, leg.id)):
            leg.quiet_s += step_s
            if leg.began and leg.quiet_s > leg.longest_s:
                leg.longest_s = leg.quiet_s
            if (silent_s := min(leg.quiet_s, leg.node.pace.quiet_s)) >= self._shortest_s and leg.id in self._legs:
                self._look_at(leg, silent_s)

    def _look_at(self, leg: WatchedLeg, silent_s: float) -> None:
        """Three cases:

        1. Its time is not up: nothing.
        2. Its node was trusted: it is not any more, and each leg there is to go elsewhere.
        3. Its node was suspected before, and then there was nobody to take the leg over: perhaps there is now.
        """
        node = leg.node
        what, limit_s = leg.limit(self._config)
        error = NodeStalledError(f"node {node.id} stalled: no {what} for {silent_s:.1f} s (limit {limit_s:.1f} s)")
        if node.trust.suspected:
            if leg.quiet_s >= leg.again_s:
                leg.again_s = leg.quiet_s + self._limits.again_s
                leg.move(error)
        elif silent_s >= limit_s:
            node.trust.suspect(self._now() - silent_s, error.message, limit_s)
            node.touch()
            log_fields(_log, logging.WARNING, "node_suspected", node=node.id, role=node.role, why=error.message)
            for tell in self.on_suspect:
                tell(node)
            there = [other for other in self._legs.values() if other.node is node and not other.paused]
            for other in sorted(there, key=lambda other: (other.started_at, other.id)):
                other.again_s = other.quiet_s + self._limits.again_s
                other.move(error)


def works(node: KnownNode, now: float, *, lost: bool = False) -> None:
    """The node has done something. `lost`: it was lost before, and answers again. It was only slow if twice the time
    would have been enough; one that hung for longer has no more time from here on, or the next hang costs twice."""
    if node.trust.works(lost=lost):
        if now - node.trust.since <= 2 * node.trust.limit_s:
            node.pace.was_only_slow()
        log_fields(_log, logging.INFO, "node_works", node=node.id, role=node.role)
