"""What tenants use at the other routers: each tells the others what its own requests took, so that all of them count.

Invariant: the routers that hear each other together give a tenant no more than its limit, but for one request of each
other router at the same moment, and `slack`. A router gives by itself what would not be too much if each of the others
gave as much meanwhile; for all beyond that it asks them first. One that is away is not waited for, and is told what it
has missed, as counts are of all time. Pure but for `ask`.
"""

import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, field

import msgspec

from kvcore.clock import Clock
from kvcore.errors import InvalidRequestError
from kvcore.tenants.source import KeySource
from router.tenants.limits import GateLimits
from router.tenants.rates import Allowance, TenantUses


class TenantTotals(msgspec.Struct, array_like=True):
    """Of one tenant at one router. `running` now; the others since the router began."""

    running: int = 0
    requests: int = 0
    tokens: int = 0


class UseReport(msgspec.Struct, forbid_unknown_fields=True):
    """What one router tells: `router` is drawn at its start, so that one that starts anew is another; `number` grows.
    `whole`: all its tenants are here. `asked`: it wants to know what these have used."""

    router: str
    number: int
    tenants: dict[str, TenantTotals]
    whole: bool = True
    asked: list[str] = []


@dataclass(slots=True)
class OtherRouter:
    """One that this router tells. `reached`: at the last try. `told`: what it knows of this router; None: nothing."""

    reached: bool = True
    told: dict[str, TenantTotals] | None = None


@dataclass(slots=True)
class _HeardTotals:
    """What another router said of itself."""

    told_at: float
    number: int
    totals: dict[str, TenantTotals] = field(default_factory=dict)


_NOTHING = TenantTotals()


class SharedUse:
    """This router's totals, and what the others have told of theirs."""

    def __init__(self, keys: KeySource, clock: Clock, limits: GateLimits) -> None:
        self.uses = TenantUses(limits)
        self.others: Sequence[OtherRouter] = ()
        self.ask: Callable[[str], Awaitable[None]] = _ask_nobody
        """Has those that are reached say what they gave a tenant, and marks who did not."""
        self._keys, self._clock, self._limits = keys, clock, limits
        self._id, self._number = secrets.token_hex(8), 0
        self._own: OrderedDict[str, TenantTotals] = OrderedDict()
        self._heard: dict[str, _HeardTotals] = {}

    def __repr__(self) -> str:
        return f"<SharedUse of {len(self._own)} tenants here, {len(self._heard)} other routers>"

    def took(self, tenant: str, *, running: int = 0, requests: int = 0, tokens: int = 0) -> None:
        """A request of this router's: begun, ended, or known to take so much."""
        own = self._own.get(tenant)
        if own is None:
            own = self._own[tenant] = TenantTotals()
            for idle in [name for name, one in self._own.items() if not one.running][: self._over()]:
                del self._own[idle]
        own.running += running
        own.requests += requests
        own.tokens += tokens
        self._own.move_to_end(tenant)

    def running_elsewhere(self, tenant: str) -> int:
        """Requests under way at routers that spoke lately."""
        since = self._clock.now() - self._limits.use_lasts_s
        return sum(
            found.running
            for other in self._heard.values()
            if other.told_at >= since and (found := other.totals.get(tenant)) is not None
        )

    # --- what the others are asked ---

    async def before(self, tenant: str, want: TenantTotals) -> None:
        """Before it is decided whether a tenant gets so much: asks the others where that depends on them. Nothing may
        be awaited between the end of this and `took`."""
        asked = False
        for _ in range(self._limits.max_asks):
            if self._knows_enough(tenant, want, asked=asked):
                return
            await self.ask(tenant)
            asked = True

    def _knows_enough(self, tenant: str, want: TenantTotals, *, asked: bool) -> bool:
        """1. Nobody else gives anything, or nothing is limited. 2. It is too much whatever the others say. 3. It fits
        although each of the others gives as much, of which nothing is known here. 4. Nothing was given here since they
        were asked: somebody must be the first to take of what is left.

        What ended at another router may make room for a request: that is asked before it is refused."""
        others = [one.told for one in self.others if one.reached]
        if not others:
            return True
        limits, now = self._keys.ring.limits(tenant), self._clock.now()
        use = self.uses.of(tenant, limits, now)
        if limits.concurrency is None and use.requests is None and use.tokens is None:
            return True
        told = [totals.get(tenant, _NOTHING) for totals in others if totals is not None]
        if len(told) < len(others):
            return False
        own = self._own.get(tenant, _NOTHING)
        if _is_too_much(use.requests, want.requests, now) or _is_too_much(use.tokens, want.tokens, now):
            return True

        def fits(wanted: int, untold: int, left: float, most: float) -> bool:
            """`left` is so without what was given here and is not known to the others."""
            if not wanted or (asked and untold <= 0):
                return True
            given = untold + wanted
            return given <= 0 or given * (len(others) + 1) <= max(left + untold, self._limits.slack * most)

        if want.running and limits.concurrency is not None:
            room = limits.concurrency - own.running
            left = room - self.running_elsewhere(tenant)
            if left < want.running:
                return asked or room < want.running
            if not fits(want.running, own.running - min(one.running for one in told), left, limits.concurrency):
                return False
        pairs = (
            (use.requests, want.requests, own.requests - min(one.requests for one in told)),
            (use.tokens, want.tokens, own.tokens - min(one.tokens for one in told)),
        )
        return all(kept is None or fits(wanted, new, kept.left(now), kept.most) for kept, wanted, new in pairs)

    # --- the exchange ---

    def report(self, tenants: Collection[str] | None = None, asked: Collection[str] = ()) -> UseReport:
        """What this router tells of these tenants; None: of all."""
        self._number += 1
        names = self._own if tenants is None else [name for name in tenants if name in self._own]
        totals = {name: copy(self._own[name]) for name in names}
        return UseReport(self._id, self._number, totals, tenants is None, list(asked))

    def told(self, report: UseReport) -> None:
        """Another router told this. What is new of it is taken from its tenants' allowances here; what a router says
        when it is heard for the first time was used before. One that another has overtaken says nothing new."""
        if report.router == self._id:
            return
        now, other = self._clock.now(), self._heard.get(report.router)
        if other is None:
            if report.whole:
                self._meet(report, now)
            return
        other.told_at = now
        if report.number <= other.number:
            return
        other.number = report.number
        for tenant, totals in report.tenants.items():
            before = other.totals.get(tenant, _NOTHING)
            use = self.uses.of(tenant, self._keys.ring.limits(tenant), now)
            if use.requests is not None and totals.requests > before.requests:
                use.requests.take(totals.requests - before.requests, now)
            if use.tokens is not None and totals.tokens > before.tokens:
                use.tokens.take(totals.tokens - before.tokens, now)
        other.totals = report.tenants if report.whole else other.totals | report.tenants

    def _meet(self, report: UseReport, now: float) -> None:
        lasting = now - self._limits.use_lasts_s
        self._heard = {name: one for name, one in self._heard.items() if one.told_at >= lasting}
        if len(self._heard) >= self._limits.max_routers:
            raise InvalidRequestError(f"more than {self._limits.max_routers} routers say what tenants use")
        self._heard[report.router] = _HeardTotals(now, report.number, report.tenants)

    def _over(self) -> int:
        return max(0, len(self._own) - self._limits.max_tenants)


def _is_too_much(kept: Allowance | None, wanted: int, now: float) -> bool:
    return kept is not None and wanted > 0 and kept.wait_s(wanted, now) > 0


async def _ask_nobody(_: str) -> None:
    """There are no others."""
