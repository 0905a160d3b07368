"""Wires one metadata server: state, core, HTTP shell, and the order in which they stop. Nothing else lives here."""

import asyncio
import logging

from starlette.types import ASGIApp

from kvcore.clock import Clock, SystemClock, WakefulClock
from kvcore.config.live.settings import metadata_settings
from kvcore.config.records import EtcdRecordsConfig
from kvcore.config.schema import ClusterConfig, MetadataServerConfig
from kvcore.config.servers import own_part
from kvcore.eviction.quotas import TenantShares
from kvcore.ports import authorities_of, base_url
from kvcore.process.asgi import AsgiServer
from kvcore.process.certified_app import CertifiedApp
from kvcore.process.http_gate import HttpGate, show_gates
from kvcore.process.limits import HttpLimits
from kvcore.process.proven_app import OPEN_PATHS, ProvenApp
from kvcore.process.service import Lifecycle
from kvcore.telemetry import Metrics, log_fields
from kvcore.tenants.shares import FollowedShares
from kvcore.trust.http_proof import RequestVerifier
from kvcore.trust.opening import ClusterTrust, open_trust, trust_source
from metadata_server.core import MetadataCore
from metadata_server.leading.election import Election
from metadata_server.leading.lives import by_clock, first_generation_alone
from metadata_server.leading.terms import Terms, new_index
from metadata_server.mooncake.dialect import MooncakeDialect
from metadata_server.mooncake.http_shell import PATH, MooncakeApp, MooncakePort
from metadata_server.mooncake.opening import open_dialect, tls_of, token_of
from metadata_server.partitions.membership import join_set
from metadata_server.records.base import Records
from metadata_server.records.node_orders import NodeOrdering
from metadata_server.records.opening import open_records
from metadata_server.records.pins import PinRecords
from metadata_server.records.switches import BlendSwitches
from metadata_server.shell.app import create_app
from metadata_server.shell.metrics import register_mooncake

_logger = logging.getLogger("metadata_server")


def create_core(
    config: ClusterConfig,
    clock: Clock,
    pins: PinRecords | None = None,
    records: Records | None = None,
    *,
    first_generation: int | None = None,
    shares: TenantShares | None = None,
) -> MetadataCore:
    """An empty index with an epoch and generations that no earlier life had. Without `first_generation`: as far as the
    wall clock grows. `shares`: as of MetadataState."""
    state = new_index(config, clock, by_clock(clock) if first_generation is None else first_generation, shares)
    orders = NodeOrdering(state, clock, records)
    return MetadataCore(state, clock, pins=pins, orders=orders, switches=BlendSwitches(records))


async def main(config: ClusterConfig, lifecycle: Lifecycle, *, change_partitions: bool = False) -> None:
    """Serve until `lifecycle.stopping`. Raises ConfigError if the address or the records cannot be had, or the records
    are of an index with other partitions, unless `change_partitions` says that these are its own from now on."""
    clock, server, metrics = SystemClock(), config.metadata_server, Metrics()
    if lifecycle.file is not None:
        lifecycle.file.goes_by(metadata_settings)
    part = own_part(server)
    records = await open_records(config, clock, part)
    lifecycle.stack.push_async_callback(records.aclose)
    lifecycle.tasks.create_task(records.run(), name="records")
    await _join(config, clock, records, change=change_partitions)
    trust = open_trust(trust_source(config, "metadata-server"))
    followed = await asyncio.to_thread(FollowedShares, config, trust.secrets)
    lifecycle.tasks.create_task(followed.follow(), name="tenants' shares")
    shares = followed.shares
    if server.standbys:
        core = create_core(config, clock, shares=shares)
    else:
        core = await _only_core(config, clock, records, lifecycle, shares)
    gates: dict[str, HttpGate] = {}
    show_gates(metrics, gates)
    mooncake, dialect = await _open_mooncake(config, records, clock, metrics, lifecycle, gates=gates)
    core.janitor.look_after(records, dialect)
    app = create_app(core, clock, metrics, server.max_body, mooncake=mooncake)
    shell = AsgiServer(
        _gated(app, config, clock, trust),
        server.host,
        server.port,
        limits=HttpLimits(listeners=_num_listeners(server)).holding(4 * server.max_body),
        tls=None if trust.certificate is None else trust.certificate.server,
    )
    if trust.certificate is not None:
        lifecycle.tasks.create_task(trust.certificate.follow(), name="certificate")
    gates["metadata"] = shell.gate
    lifecycle.stack.push_async_callback(shell.aclose)
    if server.standbys:
        _elect(config, clock, records, core, lifecycle, shares=shares)
    await shell.start()
    lifecycle.describe.append(lambda: [repr(core), repr(records), repr(core.orders), repr(core.leader)])
    lifecycle.tasks.create_task(core.run(), name="metadata ticks")
    lifecycle.tasks.create_task(shell.wait_failed(), name="metadata http")
    lifecycle.ready(url=shell.url, epoch=core.state.epoch)
    await lifecycle.stopping.wait()
    core.stop()
    await shell.drain(config.service.drain_s)


async def _join(config: ClusterConfig, clock: Clock, records: Records, *, change: bool) -> None:
    """The set is the cluster's, not a partition's: in etcd it is in a record that all partitions share."""
    part = own_part(config.metadata_server)
    whole = None if part is None else part.whole
    if part is None or not isinstance(config.metadata_server.records, EtcdRecordsConfig):
        await join_set(records, whole, change=change)
        return
    shared = await open_records(config, clock)
    try:
        await join_set(shared, whole, change=change)
    finally:
        await shared.aclose()


def _gated(app: ASGIApp, config: ClusterConfig, clock: Clock, trust: ClusterTrust) -> ASGIApp:
    """`/metadata` is for Mooncake's own clients, which have a token instead."""
    needs = lambda scope: scope["path"] not in (*OPEN_PATHS, PATH)  # noqa: E731
    if trust.certificate is not None:
        return CertifiedApp(app, needs, names_matter=config.security.nodes is not None)
    if trust.secrets is None:
        return app
    names = authorities_of(config.metadata_server.host, config.metadata_server.port)
    return ProvenApp(app, RequestVerifier(trust, clock, names), needs)


async def _only_core(
    config: ClusterConfig, clock: Clock, records: Records, lifecycle: Lifecycle, shares: TenantShares
) -> MetadataCore:
    pins = PinRecords(records, clock)
    first = await first_generation_alone(records, clock)
    core = create_core(config, clock, pins, records, first_generation=first, shares=shares)
    await pins.restore(core.state)
    await core.orders.restore()
    lifecycle.describe.append(lambda: [repr(pins)])
    lifecycle.tasks.create_task(pins.run(), name="pins' records")
    lifecycle.tasks.create_task(core.orders.run(), name="orders' records")
    return core


def _elect(
    config: ClusterConfig,
    clock: Clock,
    records: Records,
    core: MetadataCore,
    lifecycle: Lifecycle,
    *,
    shares: TenantShares,
) -> None:
    """Take part in the election, until the stack unwinds: the lease is given back while the records are still open."""
    server, terms = config.metadata_server, Terms(config, clock, records, core, shares=shares)
    election = Election(
        records, WakefulClock(), base_url(server.host, server.port), server.lease_s, lead=terms.lead, follow=terms.end
    )
    core.leader = election
    task = lifecycle.tasks.create_task(election.run(), name="election")

    async def resign() -> None:
        task.cancel()
        await asyncio.wait({task})

    lifecycle.stack.push_async_callback(resign)
    lifecycle.tasks.create_task(terms.run(), name="a term's records")


def serves_mooncake(server: MetadataServerConfig) -> bool:
    """Whether this server answers `/metadata`. It is one namespace: of several partitions it is the first one's."""
    part = own_part(server)
    return server.mooncake.enabled and (part is None or part.number == 0)


def _num_listeners(server: MetadataServerConfig) -> int:
    return 2 if serves_mooncake(server) and server.mooncake.port is not None else 1


async def _open_mooncake(
    config: ClusterConfig,
    records: Records,
    clock: Clock,
    metrics: Metrics,
    lifecycle: Lifecycle,
    *,
    gates: dict[str, HttpGate],
) -> tuple[MooncakeApp | None, MooncakeDialect | None]:
    """What answers `/metadata` on the metadata server's own port (None: nothing does, or another port does), and what
    is behind it."""
    server, mooncake = config.metadata_server, config.metadata_server.mooncake
    if not serves_mooncake(server):
        return None, None
    token, tls = token_of(mooncake), tls_of(mooncake)
    dialect = await open_dialect(mooncake, records, clock)
    lifecycle.describe.append(lambda: [repr(dialect)])
    lifecycle.tasks.create_task(dialect.run(), name="mooncake")
    app = MooncakeApp(dialect, clock, register_mooncake(dialect, metrics), token)
    if mooncake.port is None:
        return app, dialect
    if tls is not None:
        lifecycle.tasks.create_task(tls.follow(), name="mooncake certificate")
    context = None if tls is None else tls.context
    limits = HttpLimits(listeners=_num_listeners(server))
    shell = AsgiServer(MooncakePort(app), server.host, mooncake.port, limits=limits, tls=context)
    gates["mooncake"] = shell.gate
    lifecycle.stack.push_async_callback(shell.aclose)
    await shell.start()
    lifecycle.tasks.create_task(shell.wait_failed(), name="mooncake http")
    log_fields(_logger, logging.INFO, "mooncake_metadata", url=f"{shell.url}/metadata")
    return None, dialect
