"""What tenants use at the other routers: each tells the others what its own requests took, so that all of them count.

A router that is away is told again what it has missed: counts are of all time. Until it has been told, a tenant may
have as much more as it asks of one router meanwhile. Pure but for `tell_others` and the ASGI entry.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from kvcore.clock import Clock
from kvcore.errors import InvalidRequestError, KVFerryError
from kvcore.process.http_body import read_body
from kvcore.process.http_client import operators_session, processes_session
from kvcore.telemetry import log_fields
from kvcore.tenants.source import KeySource
from kvcore.trust.opening import ClusterTrust
from router.api.http_errors import reply_of
from router.api.responses import JsonReply
from router.tenants.limits import GateLimits
from router.tenants.rates import TenantUses

PATH = "/v1/tenants/use"
_log = logging.getLogger("router")


class TenantTotals(msgspec.Struct, array_like=True):
    """Of one tenant at one router. `running` now; the others since the router began."""

    running: int = 0
    requests: int = 0
    tokens: int = 0


class UseReport(msgspec.Struct, forbid_unknown_fields=True):
    """What one router tells: `router` is drawn at its start, so that one that starts anew is another."""

    router: str
    tenants: dict[str, TenantTotals]


@dataclass(slots=True)
class _Other:
    told_at: float
    totals: dict[str, TenantTotals] = field(default_factory=dict)


class SharedUse:
    """This router's totals, and what the others have told of theirs."""

    def __init__(self, keys: KeySource, clock: Clock, limits: GateLimits) -> None:
        self.uses = TenantUses(limits)
        self._keys, self._clock, self._limits = keys, clock, limits
        self._id = secrets.token_hex(8)
        self._own: OrderedDict[str, TenantTotals] = OrderedDict()
        self._others: dict[str, _Other] = {}

    def __repr__(self) -> str:
        return f"<SharedUse of {len(self._own)} tenants here, {len(self._others)} other routers>"

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
            for other in self._others.values()
            if other.told_at >= since and (found := other.totals.get(tenant)) is not None
        )

    def report(self) -> UseReport:
        """All that this router tells."""
        return UseReport(self._id, {name: copy(one) for name, one in self._own.items()})

    def told(self, report: UseReport) -> None:
        """Another router told this. What is new of it is taken from its tenants' allowances here; what a router says
        when it is heard for the first time was used before."""
        if report.router == self._id:
            return
        now, other = self._clock.now(), self._others.get(report.router)
        if other is None:
            lasting = now - self._limits.use_lasts_s
            self._others = {name: one for name, one in self._others.items() if one.told_at >= lasting}
            if len(self._others) >= self._limits.max_routers:
                raise InvalidRequestError(f"more than {self._limits.max_routers} routers say what tenants use")
            self._others[report.router] = _Other(now, report.tenants)
            return
        for tenant, totals in report.tenants.items():
            before = other.totals.get(tenant, TenantTotals())
            use = self.uses.of(tenant, self._keys.ring.limits(tenant), now)
            if use.requests is not None and totals.requests > before.requests:
                use.requests.take(totals.requests - before.requests, now)
            if use.tokens is not None and totals.tokens > before.tokens:
                use.tokens.take(totals.tokens - before.tokens, now)
        other.told_at, other.totals = now, report.tenants

    def _over(self) -> int:
        return max(0, len(self._own) - self._limits.max_tenants)


@dataclass(frozen=True, slots=True)
class UseRoute:
    """ASGI: `POST /v1/tenants/use`, for who proves to be of the cluster; all else is `app`'s."""

    app: ASGIApp
    use: SharedUse
    limits: GateLimits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await read_body(Request(scope, receive), self.limits.max_report_bytes)
            self.use.told(msgspec.msgpack.decode(body, type=UseReport))
        except msgspec.DecodeError as error:
            refused = InvalidRequestError(f"this is no report of what tenants use: {error}")
            await JsonReply(reply_of(refused), refused.http_status)(scope, receive, send)
        except KVFerryError as error:
            await JsonReply(reply_of(error), error.http_status)(scope, receive, send)
        else:
            await JsonReply({})(scope, receive, send)


async def tell_others(
    use: SharedUse, urls: Sequence[str], trust: ClusterTrust, limits: GateLimits, *, apart: bool = False
) -> None:
    """Each `tell_s`, each of the others by itself: one that hangs delays nobody. `apart`: they are processes with ports
    of their own. Runs until cancelled."""
    timeout = aiohttp.ClientTimeout(total=limits.tell_timeout_s)
    made = processes_session if apart else operators_session
    async with made(trust=trust, timeout=timeout) as session, asyncio.TaskGroup() as tasks:
        for url in urls:
            tasks.create_task(_tell(session, use, f"{url}{PATH}", limits))


async def _tell(session: aiohttp.ClientSession, use: SharedUse, url: str, limits: GateLimits) -> None:
    away = False
    while True:
        try:
            async with session.post(url, data=msgspec.msgpack.encode(use.report())) as reply:
                why = "" if reply.status == 200 else f"HTTP {reply.status}"
        except (aiohttp.ClientError, TimeoutError, OSError, KVFerryError) as error:
            why = f"{type(error).__name__}: {error}"
        if bool(why) != away:
            away = bool(why)
            log_fields(_log, logging.WARNING if away else logging.INFO, "other_router", url=url, told=not away, why=why)
        await asyncio.sleep(limits.tell_s)
