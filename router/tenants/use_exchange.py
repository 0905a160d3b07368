"""How routers tell each other what tenants use: `POST /v1/tenants/use`, each quarter of a second and when one asks."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvcore.errors import InvalidRequestError, KVFerryError
from kvcore.process.http_body import read_body
from kvcore.telemetry import log_fields
from kvcore.trust.opening import ClusterTrust
from router.api.http_errors import reply_of
from router.api.responses import JsonReply
from router.processes.posting import Post, posting
from router.tenants.limits import GateLimits
from router.tenants.shared_use import OtherRouter, SharedUse, UseReport

PATH = "/v1/tenants/use"
_log = logging.getLogger("router")


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
            report = msgspec.msgpack.decode(body, type=UseReport)
            self.use.told(report)
        except msgspec.DecodeError as error:
            refused = InvalidRequestError(f"this is no report of what tenants use: {error}")
            await JsonReply(reply_of(refused), refused.http_status)(scope, receive, send)
        except KVFerryError as error:
            await JsonReply(reply_of(error), error.http_status)(scope, receive, send)
        else:
            said = msgspec.msgpack.encode(self.use.report(report.asked))
            await Response(said, media_type="application/msgpack")(scope, receive, send)


@dataclass(slots=True)
class _Link:
    """To one of the others. `waiting`: tenants of which it is to be asked, and who wait for the answer."""

    url: str
    other: OtherRouter
    waiting: list[tuple[str, asyncio.Future[None]]] = field(default_factory=list)
    wanted: asyncio.Event = field(default_factory=asyncio.Event)


class UseExchange:
    """Tells `urls` what `use` has, and asks them for it."""

    def __init__(self, use: SharedUse, urls: Sequence[str], limits: GateLimits) -> None:
        self._use, self._limits = use, limits
        self._links = [_Link(f"{url}{PATH}", OtherRouter()) for url in urls]
        use.others = [link.other for link in self._links]
        use.ask = self.ask

    def __repr__(self) -> str:
        return f"<UseExchange with {len(self._links)} other routers>"

    async def run(self, post: Post) -> None:
        """Each of the others by itself: one that hangs delays nobody. Runs until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for link in self._links:
                tasks.create_task(self._keep_telling(link, post))

    async def ask(self, tenant: str) -> None:
        """Until those that are reached have said what the tenant had up to now, or do not answer."""
        waits: list[tuple[_Link, asyncio.Future[None]]] = []
        for link in self._links:
            if link.other.reached:
                answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                link.waiting.append((tenant, answered))
                link.wanted.set()
                waits.append((link, answered))
        if waits:
            await asyncio.wait([answered for _, answered in waits], timeout=self._limits.ask_s)
        for link, answered in waits:
            if not answered.done():
                link.other.reached = False
                answered.cancel()

    async def _keep_telling(self, link: _Link, post: Post) -> None:
        loop, limits, away, whole_at = asyncio.get_running_loop(), self._limits, False, 0.0
        while True:
            waiting, link.waiting = link.waiting, []
            link.wanted.clear()
            asked = {tenant for tenant, _ in waiting}
            whole = link.other.told is None or loop.time() >= whole_at
            why = await self._tell(link, post, self._use.report(None if whole else asked, asked))
            if whole:
                whole_at = loop.time() + (limits.retry_s if why else limits.tell_s)
            for _, answered in waiting:
                if not answered.done():
                    answered.set_result(None)
            if bool(why) != away:
                away = bool(why)
                level = logging.WARNING if away else logging.INFO
                log_fields(_log, level, "other_router", url=link.url, told=not away, why=why)
            await asyncio.sleep(limits.ask_every_s)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(whole_at):
                    await link.wanted.wait()

    async def _tell(self, link: _Link, post: Post, report: UseReport) -> str:
        """Why it did not work; empty: it did."""
        other = link.other
        try:
            said = await post(link.url, msgspec.msgpack.encode(report))
            self._use.told(msgspec.msgpack.decode(said, type=UseReport))
        except (aiohttp.ClientError, TimeoutError, OSError, KVFerryError, msgspec.DecodeError) as error:
            other.reached, other.told = False, None
            return f"{type(error).__name__}: {error}"
        other.reached = True
        other.told = report.tenants if report.whole else (other.told or {}) | report.tenants
        return ""


async def exchange_use(exchange: UseExchange, trust: ClusterTrust, limits: GateLimits, *, apart: bool = False) -> None:
    """`apart`: the others are processes with ports of their own. Runs until cancelled."""
    async with posting(trust, apart=apart, timeout_s=limits.tell_timeout_s) as post:
        await exchange.run(post)
