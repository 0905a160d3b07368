"""The one place where a cluster file becomes what a request passes before the router's routes."""

import asyncio
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Scope

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import other_urls, own_host, own_ports
from kvcore.ports import authorities_of
from kvcore.process.certified_app import CertifiedApp
from kvcore.process.proven_app import ProvenApp, all_but_open_paths
from kvcore.process.service import Lifecycle
from kvcore.tenants.salts import salts_by
from kvcore.tenants.source import KeySource
from kvcore.trust.http_proof import RequestVerifier
from kvcore.trust.opening import ClusterTrust
from router.requests.records import RequestLog
from router.tenants.gate import TenantGate
from router.tenants.limits import GateLimits
from router.tenants.paths import is_operators_path
from router.tenants.public import PublicPrefixes
from router.tenants.shared_use import SharedUse
from router.tenants.sides import ClientsSide, is_operators
from router.tenants.use_exchange import UseExchange, UseRoute, exchange_use
from router.text.tokenizer import Tokenizer

Guard = Callable[[ASGIApp], ASGIApp]
_NO_ORDERS = "orders about the cluster need security.secret, or router.admin_port and a certificate of security.tls"


async def open_guard(
    config: ClusterConfig,
    log: RequestLog,
    clock: Clock,
    lifecycle: Lifecycle,
    *,
    trust: ClusterTrust,
    tokenizer: Tokenizer,
    process: int = 1,
    limits: GateLimits = GateLimits(),
) -> Guard:
    """What puts the gates before an application. The file of keys is followed from now on. `process`: which of the
    router's this is. Raises ConfigError.

    Who may ask what only operators may:
    1. The file has API keys: who has an admin's, proves the secret, or has shown a certificate.
    2. It has none, and operators come by certificates: who has shown one, on the operators' port.
    3. Else, with a secret: who proves it. 4. There is nothing of all this: whoever reaches the router.
    """
    router, keys, proved = config.router, config.security.keys, _proved_by(config, trust, clock)
    apart, certified = router.admin_port is not None, trust.certificate is not None
    if keys is not None:
        told = other_urls(config, process)
        guard = await _keys_gate(
            config, log, clock, lifecycle, trust=trust, tokenizer=tokenizer, told=told, limits=limits
        )
    elif certified and apart:
        guard = lambda app: CertifiedApp(proved(app, _none) if proved else app, _on_operators_side)  # noqa: E731
    elif proved is not None:
        guard = lambda app: proved(app, _is_operators_path)  # noqa: E731
    elif certified:
        guard = lambda app: CertifiedApp(app, _is_operators_path, why=_NO_ORDERS)  # noqa: E731
    else:
        guard = lambda app: app  # noqa: E731
    if not apart:
        return guard
    return lambda app: ClientsSide(guard(app), has_keys=keys is not None)


def _proved_by(
    config: ClusterConfig, trust: ClusterTrust, clock: Clock
) -> Callable[[ASGIApp, Callable[[Scope], bool]], ASGIApp] | None:
    """None: there is no secret."""
    if trust.secrets is None:
        return None
    router = config.router
    names = authorities_of(router.host, router.port)
    more = [*filter(None, [router.admin_port]), *own_ports(config)]
    if names is not None and more:
        found = [authorities_of(own_host(config), port) for port in more]
        names = None if None in found else names.union(*filter(None, found))
    verifier = RequestVerifier(trust, clock, names)
    return lambda app, needs: ProvenApp(app, verifier, needs)


async def _keys_gate(
    config: ClusterConfig,
    log: RequestLog,
    clock: Clock,
    lifecycle: Lifecycle,
    *,
    trust: ClusterTrust,
    tokenizer: Tokenizer,
    told: Sequence[str],
    limits: GateLimits,
) -> Guard:
    """`told`: where the others are that are told what tenants use."""
    wanted, secrets, proved = config.security.keys, trust.secrets, _proved_by(config, trust, clock)
    assert wanted is not None and secrets is not None, "the cluster file was checked"
    keys = await asyncio.to_thread(KeySource, wanted)
    public = await asyncio.to_thread(PublicPrefixes.read, config, tokenizer)
    lifecycle.tasks.create_task(_follow(keys, limits.reload_s), name="API keys")
    shared = SharedUse(keys, clock, limits)
    if told:
        exchange = UseExchange(shared, told, limits)
        sends = exchange_use(exchange, trust, limits, apart=config.router.processes > 1)
        lifecycle.tasks.create_task(sends, name="what tenants use")

    def guard(app: ASGIApp) -> ASGIApp:
        app = UseRoute(app, shared, limits)
        gate = TenantGate(
            app,
            keys,
            salts_by(secrets),
            clock,
            proved=None if proved is None else proved(app, lambda _: True),
            shared=shared,
            apart=config.router.admin_port is not None,
            gateways=wanted.gateways,
            public=public,
            limits=limits,
        )
        log.observers.append(gate.ended)
        lifecycle.describe.append(lambda: [repr(gate)])
        return gate

    return guard


async def _follow(keys: KeySource, pause_s: float) -> None:
    while True:
        await asyncio.sleep(pause_s)
        await asyncio.to_thread(keys.refresh)


def _is_operators_path(scope: Scope) -> bool:
    return is_operators_path(scope["method"], scope["path"])


def _on_operators_side(scope: Scope) -> bool:
    return is_operators(scope) and all_but_open_paths(scope)


def _none(_: Scope) -> bool:
    """No request needs a proof; one that carries it gets an answer with one."""
    return False
