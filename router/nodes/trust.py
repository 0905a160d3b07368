"""Whether a node is trusted with legs: not while it is suspected, and of more and more of them after that. Pure.

What leads to what (tests hold it to this table):

    trusted    suspect    suspected
    trusted    works      trusted on_trial
    suspected  suspect    suspected
    suspected  works      on_trial
    on_trial   suspect    suspected
    on_trial   works      on_trial
    on_trial   succeeded  on_trial trusted

works: it has done something since it was suspected, or answers again after it was lost. succeeded: a leg did what it
should; one on trial may have twice as many at a time then.
"""

import math
from enum import StrEnum

from router.nodes.limits import NodeHealthLimits


class TrustState(StrEnum):
    """trusted: as any. suspected: no new legs. on_trial: a few at a time, while others are there."""

    TRUSTED = "trusted"
    SUSPECTED = "suspected"
    ON_TRIAL = "on_trial"


class NodeTrust:
    """In one node. Invariants: `why` only while suspected, `room` only while on trial."""

    def __init__(self, limits: NodeHealthLimits) -> None:
        self._limits = limits
        self.state = TrustState.TRUSTED
        self.why = ""
        self.since = 0.0
        """Of the silence for which it was suspected last, the beginning …"""
        self.limit_s = math.inf
        """… and how long that might have been."""
        self.room = 0
        """Legs at a time, while it is on trial."""

    def __repr__(self) -> str:
        return f"<NodeTrust {self.state}{': ' + self.why if self.why else ''}>"

    @property
    def suspected(self) -> bool:
        """Whether it gets no new legs."""
        return self.state is TrustState.SUSPECTED

    def has_room(self, legs: int) -> bool:
        """Whether it is trusted with one more beside these."""
        return self.state is TrustState.TRUSTED or (self.state is TrustState.ON_TRIAL and legs < self.room)

    def suspect(self, since: float, why: str, limit_s: float = math.inf) -> None:
        """A leg on it was silent for longer than its limit, and nothing that it does was seen meanwhile."""
        if not self.suspected:
            self.state, self.why, self.room = TrustState.SUSPECTED, why, 0
            self.since, self.limit_s = since, limit_s

    def works(self, *, lost: bool = False) -> bool:
        """It has done something. `lost`: after it was lost. Whether that ended a suspicion."""
        if not (self.suspected or (lost and self.state is TrustState.TRUSTED)):
            return False
        ended = self.suspected
        self.state, self.why, self.room = TrustState.ON_TRIAL, "", 1
        return ended

    def succeeded(self) -> None:
        """A leg on it did what it should."""
        if self.state is TrustState.ON_TRIAL:
            self.room *= 2
            if self.room >= self._limits.trusted_legs:
                self.state, self.room = TrustState.TRUSTED, 0
