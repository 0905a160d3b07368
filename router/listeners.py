"""Where the router listens: for clients, and, if the cluster file says so, for operators on a port of their own.

Of several processes both are shared, and each has a third port, its own, for operators and the other processes.
"""

import asyncio
import logging
import ssl
from contextlib import suppress
from functools import partial

from starlette.types import ASGIApp, Receive, Scope, Send

from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import own_host, own_ports
from kvcore.process.asgi import AsgiServer
from kvcore.process.descriptors import soft_limit
from kvcore.process.http_exchange import Headers, HttpExchange, exchange_of
from kvcore.process.http_gate import show_gates
from kvcore.process.limits import HttpLimits
from kvcore.process.service import Lifecycle
from kvcore.telemetry import Metrics, log_fields
from kvcore.trust.opening import ClusterTrust
from kvcore.trust.tls import ServerCertificate
from router.descriptors import clients_at_most, descriptors_needed, operators_at_most
from router.processes.limits import ProcessLimits
from router.tenants.sides import OperatorsSide

_log = logging.getLogger("router")
_HELD_BODIES = 16
"""Bodies of the longest kind that may be under way at once."""


class RouterListeners:
    """`clients`, `operators` where there is a port for them, `own` of one process of several. `start`, then `drain` or
    `aclose`, before it `leave`."""

    def __init__(
        self,
        app: ASGIApp,
        config: ClusterConfig,
        trust: ClusterTrust,
        metrics: Metrics,
        lifecycle: Lifecycle,
        *,
        process: int = 1,
        process_limits: ProcessLimits = ProcessLimits(),
    ) -> None:
        """Certificates are followed from now on. `process`: which one of several. Raises ConfigError: one cannot be
        used."""
        bounds, limits, ports = config.router, _connection_limits(config), own_ports(config)
        self._limits = process_limits
        tls = _site_tls(config, lifecycle)
        inner = tls if trust.certificate is None else trust.certificate.server
        held = HttpLimits(max_connections=operators_at_most(soft_limit())).holding(bounds.max_body)
        shared = bool(ports)
        self._closing = ClosingApp(app)
        public = self._closing if shared else app
        self.clients = AsgiServer(public, bounds.host, bounds.port, limits=limits, tls=tls, shared=shared)
        self.operators, self.own = None, None
        gates, side = {"router": self.clients.gate}, OperatorsSide(app)
        if bounds.admin_port is not None:
            self.operators = AsgiServer(
                OperatorsSide(public), own_host(config), bounds.admin_port, limits=held, tls=inner, shared=shared
            )
            gates["router_admin"] = self.operators.gate
        if ports:
            self.own = AsgiServer(side, own_host(config), ports[process - 1], limits=held, tls=inner)
            gates["router_process"] = self.own.gate
        show_gates(metrics, gates)
        # its own first: who cannot have it must not take connections of those that can
        self._all = [*filter(None, [self.own]), self.clients, *filter(None, [self.operators])]
        self._shared = [server for server in self._all if shared and server is not self.own]

    @property
    def urls(self) -> dict[str, str]:
        """For the log, after `start`."""
        more = {"admin": self.operators, "own": self.own}
        return {"url": self.clients.url, **{name: server.url for name, server in more.items() if server is not None}}

    async def start(self) -> None:
        """Raises ConfigError: an address cannot be had; then none is left."""
        try:
            for server in self._all:
                await server.start()
        except BaseException:
            await self.aclose()
            raise

    async def wait_failed(self) -> None:
        """Returns or raises when one of them ends."""
        waits = [asyncio.ensure_future(server.wait_failed()) for server in self._all]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
        finally:
            for one in waits:
                one.cancel()

    async def leave(self) -> None:
        """Of several processes: the others get new connections from now on. What comes by those that this one has is
        answered, and closes them; those that send nothing for a moment are closed. Then no request comes any more."""
        if not self._shared:
            return
        for server in self._shared:
            server.leave()
        self._closing.closes = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.linger_s):
                while any(server.num_connections for server in self._shared):  # noqa: ASYNC110 - once in a life
                    await asyncio.sleep(self._limits.look_s)
        for server in self._shared:
            server.begin_drain()

    async def drain(self, deadline_s: float) -> None:
        """See AsgiServer."""
        await asyncio.gather(*(server.drain(deadline_s) for server in self._all))

    async def aclose(self) -> None:
        """End now. Idempotent."""
        for server in self._all:
            await server.aclose()


class ClosingApp:
    """Passes requests on, of a server of ours. Once it `closes`, each answer says that its connection ends with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.closes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if (exchange := exchange_of(scope)) is not None:
            exchange.on_head += (partial(self._end, exchange),)
        await self._app(scope, receive, send)

    def _end(self, exchange: HttpExchange, _status: int) -> Headers:
        exchange.keep_alive &= not self.closes
        return ()


def _site_tls(config: ClusterConfig, lifecycle: Lifecycle) -> ssl.SSLContext | None:
    if config.router.tls is None:
        return None
    certificate = ServerCertificate(config.router.tls)
    lifecycle.tasks.create_task(certificate.follow(), name="certificate")
    return certificate.context


def _connection_limits(config: ClusterConfig) -> HttpLimits:
    limit, num_nodes = soft_limit(), len(config.nodes)
    operators = operators_at_most(limit) * ((config.router.admin_port is not None) + (config.router.processes > 1))
    needed = descriptors_needed(config.router.max_requests, num_nodes) + operators
    if limit < needed:
        log_fields(_log, logging.WARNING, "few_descriptors", limit=limit, needed=needed, see="kvferry doctor")
    return HttpLimits(
        max_connections=clients_at_most(limit, num_nodes, operators=operators),
        max_per_client=config.router.max_connections_per_client,
        max_held_bytes=_HELD_BODIES * config.router.max_body,
    )
