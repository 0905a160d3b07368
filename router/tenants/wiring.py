"""The one place where a cluster file's API keys become the gate of its router."""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.process.service import Lifecycle
from kvcore.tenants.salts import salts_by
from kvcore.tenants.source import KeySource
from kvcore.trust.secrets import Secrets
from router.requests.records import RequestLog
from router.tenants.gate import TenantGate
from router.tenants.limits import GateLimits
from router.tenants.public import PublicPrefixes
from router.text.tokenizer import Tokenizer

Guard = Callable[[ASGIApp], ASGIApp]


async def open_gate(
    config: ClusterConfig,
    log: RequestLog,
    clock: Clock,
    lifecycle: Lifecycle,
    *,
    secrets: Secrets,
    tokenizer: Tokenizer,
    proved: Guard,
    limits: GateLimits = GateLimits(),
) -> Guard | None:
    """What puts the gate before an application; None: the cluster file has no keys. `proved`: what lets through only
    what processes of the cluster prove. The file of keys is followed from now on. Raises ConfigError."""
    wanted = config.security.keys
    if wanted is None:
        return None
    keys = await asyncio.to_thread(KeySource, wanted)
    public = await asyncio.to_thread(PublicPrefixes.read, config, tokenizer)
    lifecycle.tasks.create_task(_follow(keys, limits.reload_s), name="API keys")

    def guard(app: ASGIApp) -> ASGIApp:
        gate = TenantGate(
            app,
            keys,
            salts_by(secrets),
            clock,
            proved=proved(app),
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
