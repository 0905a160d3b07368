"""How fast a node is, as its own legs tell: tokens of prompts a second, steps, how long a sequence stays. Pure.

Estimates only: no answer depends on one. None, or 0 where it says so, until something was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nodeapi.messages import Moved

_KEEP = 0.95
"""What a measurement counts for when the next one has come."""
_MOST = 8.0
"""A measurement may be so many times slower than what was expected; more is taken for an accident, unless it stays."""


@dataclass(slots=True)
class Rate:
    """So much a second: amounts over seconds, the latest ones most."""

    amount: float = 0.0
    seconds: float = 0.0
    count: int = 0

    def add(self, amount: float, seconds: float) -> None:
        """Measured once. The first of all is often a warm-up: it counts only while there is no faster one."""
        if amount <= 0 or seconds < 0:
            return
        self.count += 1
        if self.count == 2 and seconds and amount * self.seconds > self.amount * seconds:
            self.amount = self.seconds = 0.0
        if self.count > 2 and self.amount:
            seconds = min(seconds, _MOST * amount * self.seconds / self.amount)
        self.amount = self.amount * _KEEP + amount
        self.seconds = self.seconds * _KEEP + seconds

    @property
    def is_warm_up(self) -> bool:
        """Whether it was measured once."""
        return self.count == 1

    @property
    def per_s(self) -> float:
        """0: not known."""
        return self.amount / self.seconds if self.seconds else 0.0

    @property
    def each_s(self) -> float:
        """Seconds for one; 0: not known."""
        return self.seconds / self.amount if self.amount else 0.0


@dataclass(slots=True)
class NodeRates:
    """Of one node. `changes` counts measurements."""

    prefill: Rate = field(default_factory=Rate)
    """Tokens of prompts that it computes."""
    steps: Rate = field(default_factory=Rate)
    """Tokens of one sequence, after the first."""
    stays: Rate = field(default_factory=Rate)
    """Sequences, by the time from their first token to their last."""
    near: Rate = field(default_factory=Rate)
    """Bytes of KV that it reads out of memory of its own machine."""
    far: Rate = field(default_factory=Rate)
    """So out of others'."""
    changes: int = 0
    _prefilled_at: float = float("-inf")

    def prefilled(self, tokens: int, compute_s: float, now: float, *, least_tokens: int = 32) -> None:
        """A prompt of which so many tokens were computed is done. Of several that were computed at once each is
        measured from the end of the one before, so that together they say what the node computes in all. One with
        fewer than `least_tokens` says nothing: a step takes as long for one token."""
        if tokens >= least_tokens and compute_s > 0:
            self.prefill.add(tokens, min(compute_s, now - self._prefilled_at))
            self._prefilled_at = now
            self.changes += 1

    def moved(self, moves: Sequence[Moved], *, near: frozenset[str] = frozenset({"shm", "inproc"})) -> None:
        """What one leg read and wrote. `near`: transports that do not leave the machine."""
        for move in moves:
            if move.direction == "get" and move.seconds > 0:
                (self.near if move.transport in near else self.far).add(move.num_bytes, move.seconds)
                self.changes += 1

    def decoded(self, tokens: int, sequences: int, seconds: float) -> None:
        """A leg's sequences had so many tokens together, in `seconds` from the first token on."""
        if sequences and seconds > 0:
            self.stays.add(sequences, sequences * seconds)
            self.steps.add(max(0, tokens // sequences - 1), seconds)
            self.changes += 1
