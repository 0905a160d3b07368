"""Where the router listens: for clients, and, if the cluster file says so, for operators on a port of their own."""

import asyncio
import logging
import ssl

from starlette.types import ASGIApp

from kvcore.config.schema import ClusterConfig
from kvcore.process.asgi import AsgiServer
from kvcore.process.descriptors import soft_limit
from kvcore.process.http_gate import show_gates
from kvcore.process.limits import HttpLimits
from kvcore.process.service import Lifecycle
from kvcore.telemetry import Metrics, log_fields
from kvcore.trust.opening import ClusterTrust
from kvcore.trust.tls import ServerCertificate
from router.descriptors import clients_at_most, descriptors_needed, operators_at_most
from router.tenants.sides import OperatorsSide

_log = logging.getLogger("router")
_HELD_BODIES = 16
"""Bodies of the longest kind that may be under way at once."""


class RouterListeners:
    """`clients`, and `operators` where there is a port for them. `start`, then `drain` or `aclose`."""

    def __init__(
        self, app: ASGIApp, config: ClusterConfig, trust: ClusterTrust, metrics: Metrics, lifecycle: Lifecycle
    ) -> None:
        """Certificates are followed from now on. Raises ConfigError: one cannot be used."""
        bounds, limits = config.router, _connection_limits(config)
        tls = _site_tls(config, lifecycle)
        self.clients = AsgiServer(app, bounds.host, bounds.port, limits=limits, tls=tls)
        self.operators: AsgiServer | None = None
        gates = {"router": self.clients.gate}
        if bounds.admin_port is not None:
            own = tls if trust.certificate is None else trust.certificate.server
            host, few = bounds.admin_host or bounds.host, HttpLimits(max_connections=operators_at_most(soft_limit()))
            held = few.holding(bounds.max_body)
            self.operators = AsgiServer(OperatorsSide(app), host, bounds.admin_port, limits=held, tls=own)
            gates["router_admin"] = self.operators.gate
        show_gates(metrics, gates)
        self._all = [self.clients, *filter(None, [self.operators])]

    @property
    def urls(self) -> dict[str, str]:
        """For the log, after `start`."""
        admin = {} if self.operators is None else {"admin": self.operators.url}
        return {"url": self.clients.url, **admin}

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

    async def drain(self, deadline_s: float) -> None:
        """See AsgiServer."""
        await asyncio.gather(*(server.drain(deadline_s) for server in self._all))

    async def aclose(self) -> None:
        """End now. Idempotent."""
        for server in self._all:
            await server.aclose()


def _site_tls(config: ClusterConfig, lifecycle: Lifecycle) -> ssl.SSLContext | None:
    if config.router.tls is None:
        return None
    certificate = ServerCertificate(config.router.tls)
    lifecycle.tasks.create_task(certificate.follow(), name="certificate")
    return certificate.context


def _connection_limits(config: ClusterConfig) -> HttpLimits:
    limit, num_nodes = soft_limit(), len(config.nodes)
    operators = 0 if config.router.admin_port is None else operators_at_most(limit)
    needed = descriptors_needed(config.router.max_requests, num_nodes) + operators
    if limit < needed:
        log_fields(_log, logging.WARNING, "few_descriptors", limit=limit, needed=needed, see="kvferry doctor")
    return HttpLimits(
        max_connections=clients_at_most(limit, num_nodes, operators=operators),
        max_per_client=config.router.max_connections_per_client,
        max_held_bytes=_HELD_BODIES * config.router.max_body,
    )
