"""How fast a node is, as its own legs tell: tokens of prompts a second, steps, how long a sequence stays. Pure.

Estimates only: no answer depends on one. None, or 0 where it says so, until something was measured. None is believed
for ever: what leads requests away from a way is doubted with time (`Doubt`), so that the way is tried again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nodeapi.messages import Moved
from router.routing.limits import RateLimits

_LIMITS = RateLimits()


class Doubt(NamedTuple):
    """What may be doubted of a measurement. `since`: when it was last made or tried; `avoided`: by how many requests
    the way that it speaks against was avoided since then."""

    since: float = float("-inf")
    avoided: int = 0

    def is_due(self, now: float, limits: RateLimits = _LIMITS) -> bool:
        """Whether the next request is to try that way. One at a time: the try itself begins the time anew."""
        return self.avoided >= limits.doubt_requests and now - self.since >= limits.doubt_s

    def grown(self, limits: RateLimits = _LIMITS) -> "Doubt":
        """The way was avoided by one request more. The same one when that says nothing new."""
        return self if self.avoided >= limits.doubt_requests else Doubt(self.since, self.avoided + 1)


NO_DOUBT = Doubt()
RateKind = Literal["compute", "near", "far", "put"]
"""What a way's time depends on: see NodeRates."""


@dataclass(slots=True)
class Rate:
    """So much a second: amounts over seconds, the latest ones most."""

    amount: float = 0.0
    seconds: float = 0.0
    count: int = 0
    limits: RateLimits = _LIMITS
    doubt: Doubt = NO_DOUBT
    _at: float = float("-inf")

    def add(self, amount: float, seconds: float, now: float) -> None:
        """Measured once. The first of all is often a warm-up: it counts only while there is no faster one."""
        if amount <= 0 or seconds < 0:
            return
        self.count += 1
        if self.count == 2 and seconds and amount * self.seconds > self.amount * seconds:
            self.amount = self.seconds = 0.0
        if self.count > 2 and self.amount:
            seconds = min(seconds, self.limits.most * amount * self.seconds / self.amount)
        keep = self._kept(amount, seconds, now - self._at)
        self.amount = self.amount * keep + amount
        self.seconds = self.seconds * keep + seconds
        self._at, self.doubt = now, Doubt(now)

    def outlasted(self, amount: float, seconds: float, now: float) -> None:
        """So much was given up after so long. What is too slow ever to be measured would be believed to be fast, or to
        cost nothing, for ever. Where it took no longer than was expected, it was tried and has not shown to be fast."""
        if seconds > 0 and self.limits.late * amount * self.seconds <= self.amount * seconds:
            self.add(amount, seconds, now)
        elif seconds > 0:
            self.doubt = Doubt(now)

    def told(self, move: Moved, now: float) -> None:
        """Bytes that crossed, or that were too late."""
        if move.num_bytes:
            self.add(move.num_bytes, move.seconds, now)
        else:
            self.outlasted(move.late_bytes, move.seconds, now)

    def _kept(self, amount: float, seconds: float, age_s: float) -> float:
        """What all before counts for. What is old and was slower has no more seconds than this one: or else a node that
        was slow for long would be taken for slow long after."""
        keep = self.limits.keep * math.exp2(-max(0.0, age_s) / self.limits.half_life_s)
        faster = seconds and amount * self.seconds > self.amount * seconds
        return min(keep, seconds / self.seconds) if faster and age_s >= self.limits.half_life_s else keep

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


class PairRate(NamedTuple):
    """Bytes a second between two machines, and when that was last measured or tried."""

    per_s: float
    at: float


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
    """So out of others', …"""
    reads: dict[str, Rate] = field(default_factory=dict)
    """… by the machine."""
    puts: dict[str, Rate] = field(default_factory=dict)
    """So that it writes, by the machine that it writes to."""
    changes: int = 0
    _prefilled_at: float = float("-inf")

    def prefilled(self, tokens: int, compute_s: float, now: float, *, least_tokens: int = 32) -> None:
        """A prompt of which so many tokens were computed is done. Of several that were computed at once each is
        measured from the end of the one before, so that together they say what the node computes in all. One with
        fewer than `least_tokens` says nothing: a step takes as long for one token."""
        if tokens >= least_tokens and compute_s > 0:
            self.prefill.add(tokens, min(compute_s, now - self._prefilled_at), now)
            self._prefilled_at = now
            self.changes += 1

    def moved(self, moves: Sequence[Moved], now: float, *, near: frozenset[str] = frozenset({"shm", "inproc"})) -> None:
        """What one leg read and wrote. `near`: transports that do not leave the machine."""
        for move in moves:
            if move.direction == "get" and move.seconds > 0:
                (self.near if move.transport in near else self.far).told(move, now)
                if move.machine and move.transport not in near:
                    _of_machine(self.reads, move.machine).told(move, now)
                self.changes += 1

    def decoded(self, tokens: int, sequences: int, seconds: float, now: float) -> None:
        """A leg's sequences had so many tokens together, in `seconds` from the first token on."""
        if sequences and seconds > 0:
            self.stays.add(sequences, sequences * seconds, now)
            self.steps.add(max(0, tokens // sequences - 1), seconds, now)
            self.changes += 1

    def wrote(self, moves: Sequence[Moved], machine: str, now: float) -> None:
        """What one leg wrote for a node of this machine; nothing is said where it also wrote by another transport,
        which was to elsewhere."""
        found = [move for move in moves if move.direction == "put" and move.seconds > 0]
        if not machine or len(found) != 1:
            return
        _of_machine(self.puts, machine).told(found[0], now)
        self.changes += 1

    def gave_up(self, num_bytes: int, seconds: float, machine: str, now: float) -> None:
        """What one leg was to write for a node of this machine was not there after so long, and the leg was ended."""
        if num_bytes > 0:
            _of_machine(self.puts, machine).outlasted(num_bytes, seconds, now)
            self.changes += 1

    def rate(self, kind: RateKind, machine: str = "") -> Rate | None:
        """That of this kind, as views have it. `machine`: of `put`."""
        match kind:
            case "compute":
                return self.prefill
            case "near":
                return self.near if self.near.per_s else self.far
            case "far":
                return self.far if self.far.per_s else self.near
        return self.puts.get(machine)

    def read_rates(self) -> dict[str, PairRate]:
        """Bytes a second by machine."""
        return {machine: PairRate(rate.per_s, rate.doubt.since) for machine, rate in self.reads.items()}

    def put_rates(self) -> dict[str, PairRate]:
        """As `read_rates`."""
        return {machine: PairRate(rate.per_s, rate.doubt.since) for machine, rate in self.puts.items()}

    def doubts(self) -> dict[tuple[RateKind, str], Doubt]:
        """Of each rate by which ways are compared. The machine is that of `put`, or empty."""
        near, far = self.near, self.far
        found: dict[tuple[RateKind, str], Doubt] = {
            ("compute", ""): self.prefill.doubt,
            ("near", ""): (near if near.seconds else far).doubt,
            ("far", ""): (far if far.seconds else near).doubt,
        }
        for machine, rate in self.puts.items():
            found["put", machine] = rate.doubt
        return found

    def spoke_against(self, kind: RateKind, machine: str, *, tried_at: float | None) -> None:
        """A request avoided a way by this rate; or, at `tried_at`, it tries that way all the same."""
        if (rate := self.rate(kind, machine)) is not None:
            doubt = rate.doubt.grown() if tried_at is None else Doubt(tried_at)
            self.changes += doubt is not rate.doubt
            rate.doubt = doubt


def _of_machine(rates: dict[str, Rate], machine: str) -> Rate:
    """That of this one; of too many the one that came first goes."""
    if machine not in rates and len(rates) >= _LIMITS.most_machines:
        rates.pop(next(iter(rates)))
    return rates.setdefault(machine, Rate())
