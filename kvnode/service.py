"""Wires one node: transports, segment, lease, engine, control API, in this order; stops in the reverse.

Owns the order and nothing else. Stop: refuse new legs, drain, leave the metadata server, stop the engine, let the
segment go.
"""

import asyncio
import logging
import math
import secrets
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web

from engines.factory import engine_config
from engines.process.messages import EngineHello, Sample
from engines.process.parent import EngineProcess
from kvcore.clock import Clock, SystemClock
from kvcore.config.file import node_config
from kvcore.config.live.settings import node_settings, node_settings_name
from kvcore.config.schema import ClusterConfig, VllmEngineConfig
from kvcore.config.servers import internal_url
from kvcore.config.vllm_options import engine_environment
from kvcore.errors import KVFerryError, NodeUnavailableError
from kvcore.ports import authorities_of, listen
from kvcore.process.aiohttp_gate import TlsSite
from kvcore.process.http_gate import show_gates
from kvcore.process.service import Lifecycle
from kvcore.release import release
from kvcore.telemetry import Metrics
from kvcore.trust.http_proof import RequestVerifier
from kvcore.trust.opening import ClusterTrust, open_trust, trust_source
from kvcore.types import NodeInfo, Role
from kvnode.answers import CertifiedCalls, ProvenCalls
from kvnode.control_api import ControlApi
from kvnode.limits import NodeLimits
from kvnode.metrics import NodeMetrics
from kvnode.moving import ChunkMover
from kvnode.partitions.memberships import Memberships
from kvnode.probe import PeerProber
from kvnode.segment_owner import SegmentOwner
from kvnode.supervisor import EngineSupervisor
from kvnode.tasks import PausableWork, cancelled
from kvnode.tiers.node_tiers import NodeTiers
from kvnode.tiers.starting import start_tiers
from kvnode.upkeep import NodeUpkeep
from kvnode.weights import EngineWeights
from metadata_server.client import MetadataClient
from metadata_server.connect import connect_client, endpoints_of
from nodeapi.messages import OLDEST_PROTOCOL, PROTOCOL, EngineStats, NodeReport
from nodeapi.upkeep import WeightsReply, WeightsRequest
from transfer.select import build_transfer

_logger = logging.getLogger("kvnode")


@dataclass
class _RunningNode:
    """What the control API reports on."""

    owner: SegmentOwner
    membership: Memberships
    supervisor: EngineSupervisor | None
    weights: EngineWeights
    mover: ChunkMover
    settings: Callable[[], str]
    clock: Clock
    tiers: NodeTiers | None = None
    api: ControlApi | None = None
    join_by: float = math.inf
    """Until then a metadata server that does not know the node yet is waited for; known once the engine is ready."""

    def engine(self) -> EngineProcess:
        """The present engine. Raises NodeUnavailableError while there is none."""
        if self.supervisor is None:
            raise NodeUnavailableError("this node has no engine: its role is store")
        return self.supervisor.engine()

    def health(self) -> str | None:
        """Why the node does not serve; None: it does."""
        if self.membership.refused:
            return f"the metadata server refuses this node: {self.membership.refused}"
        if self.supervisor is not None and not self.supervisor.ready:
            return "the node's engine is starting"
        if not self.membership.joined_all and self.clock.now() < self.join_by:
            return "the metadata server does not know the node yet: what it computes would not be stored"
        if self.tiers is not None and self.membership.joined and not self.tiers.announced:
            return "the metadata server is being told what lies on the node's disk"
        return None

    async def sample(self, *, exposition: bool = False) -> Sample | None:
        """None while there is no engine, or where it is too busy to answer."""
        try:
            return await self.engine().sample(exposition=exposition)
        except KVFerryError:
            return None

    async def take_weights(self, request: WeightsRequest) -> WeightsReply:
        """The answer of /v1/weights."""
        assert self.api is not None, "it is asked through its API"
        return await self.weights.take(request, self.supervisor, self.api.quiet)

    async def report(self) -> NodeReport:
        """The answer of /v1/info."""
        sample = await self.sample()
        ready = self.supervisor is not None and self.supervisor.ready
        stats: EngineStats | None = sample.stats if sample is not None else None
        return NodeReport(
            protocol=PROTOCOL,
            oldest_protocol=OLDEST_PROTOCOL,
            node=self.membership.node,
            engine=self.engine().info if ready else None,
            stats=stats if ready else None,
            segments=[self.owner.segment],
            transports=sample.transports if sample is not None else {},
            draining=(self.api is not None and self.api.draining) or bool(self.membership.drained),
            engine_restarts=self.supervisor.restarts if self.supervisor is not None else 0,
            refused=self.membership.refused,
            tiers=self.tiers.reports() if self.tiers is not None else [],
            version=self.weights.version,
            release=release(),
            left_to_move=self.mover.left if self.membership.drained == "move" else None,
            settings=self.settings(),
        )


async def run_node(
    config: ClusterConfig,
    name: str,
    lifecycle: Lifecycle,
    clock: Clock | None = None,
    limits: NodeLimits = NodeLimits(),
) -> None:
    """Run node `name` until `lifecycle.stopping`, then stop in order. Raises ConfigError for what cannot be run."""
    settings, stack, clock = node_config(config, name), lifecycle.stack, clock or SystemClock()
    trust = open_trust(trust_source(config, name))
    incarnation = draw_incarnation()
    listener = listen(settings.host, settings.port)  # first: a port in use is said before memory is faulted in
    stack.callback(listener.close)
    port = listener.getsockname()[1]
    info = NodeInfo(
        id=name,
        role=settings.role,
        control_url=internal_url(config, settings.host, port),
        incarnation=incarnation,
        cluster=config.cluster,
        model=config.model.name if settings.role is not Role.STORE else "",
        protocol=PROTOCOL,
    )
    owner = await stack.enter_async_context(SegmentOwner(name, incarnation, settings, config.transport, trust))
    client = _connected(config, stack, clock, trust)
    membership = Memberships(
        client, info, lambda: [owner.segment], owner.manifests, ttl_s=config.metadata_server.node_ttl_s, limits=limits
    )
    prober = _prober(config, info, owner, client, clock=clock, limits=limits)
    owner.on_change = membership.announce_again
    tiers = await stack.enter_async_context(start_tiers(config, membership, owner, client, clock, trust=trust))
    weights = EngineWeights(config, clock)
    mover = _start_mover(config, owner, membership, client, lifecycle, clock=clock, limits=limits)
    supervisor = _supervisor(weights, membership, [prober.work, mover.work], tiers, clock=clock, limits=limits)
    own = own_settings(config, name, lifecycle)
    node = _RunningNode(owner, membership, supervisor, weights, mover, own, clock, tiers)
    lifecycle.describe.append(lambda: map(repr, (membership, node.supervisor, weights, owner, prober, mover, tiers)))
    if node.supervisor is not None:
        engine = lifecycle.tasks.create_task(node.supervisor.run(), name="engine")
        stack.push_async_callback(cancelled, engine)
    stack.push_async_callback(membership.leave)  # before the engine stops, after the last heartbeat
    stack.push_async_callback(cancelled, lifecycle.tasks.create_task(membership.run(), name="membership"))
    metrics = NodeMetrics(Metrics(), membership, owner, lambda: node.supervisor, tiers)
    node.api = ControlApi(
        engine=node.engine,
        report=node.report,
        metrics=lambda: metrics.render(node.api, lambda: node.sample(exposition=True)),
        health=node.health,
        probe=prober.probe,
        tiers=tiers,
        upkeep=NodeUpkeep(owner.view, tiers),
        weights=node.take_weights,
        limits=limits,
    )
    stack.push_async_callback(prober.aclose)
    await _serve(node.api, _gate(trust, clock, settings.host, port), listener, lifecycle, metrics=metrics, trust=trust)
    if node.supervisor is not None:
        await node.supervisor.wait_ready()
    node.join_by = clock.now() + limits.join_s
    refused = membership.refused or None
    lifecycle.ready(node=name, role=settings.role, url=info.control_url, segment=owner.segment.id, refused=refused)
    await lifecycle.stopping.wait()
    await node.api.drain(config.service.drain_s)


def own_settings(config: ClusterConfig, name: str, lifecycle: Lifecycle) -> Callable[[], str]:
    """The name of what this process goes by now. Its file is followed from here on, where it has one."""
    if (file := lifecycle.file) is None:
        at_start = node_settings_name(config, name)
        return lambda: at_start
    file.goes_by(partial(node_settings, name=name))
    return lambda: file.name


def draw_incarnation() -> int:
    """Tells this start of the node from all others; no clock, which may step back. JSON's readers keep its 53 bits."""
    return 1 + secrets.randbelow((1 << 53) - 1)


def _prober(
    config: ClusterConfig,
    node: NodeInfo,
    owner: SegmentOwner,
    client: MetadataClient,
    *,
    clock: Clock,
    limits: NodeLimits,
) -> PeerProber:
    return PeerProber(
        node=node,
        host_id=owner.segment.host_id,
        metadata=client,
        transport=config.transport,
        store=config.store,
        clock=clock,
        open_transfer=partial(build_transfer, trust=owner.trust),
        limits=limits,
    )


def _start_mover(
    config: ClusterConfig,
    owner: SegmentOwner,
    membership: Memberships,
    client: MetadataClient,
    lifecycle: Lifecycle,
    *,
    clock: Clock,
    limits: NodeLimits,
) -> ChunkMover:
    mover = ChunkMover(
        owner.view,
        node=membership.node,
        metadata=client,
        open_transfer=lambda: build_transfer(config.transport, owner.segment.host_id, trust=owner.trust),
        wanted=lambda: membership.drained == "move" or membership.sheds,
        store=config.store,
        clock=clock,
        run_blocking=asyncio.to_thread,
        limits=limits,
    )
    lifecycle.stack.push_async_callback(mover.aclose)
    task = lifecycle.tasks.create_task(mover.run(), name="moves")
    lifecycle.stack.push_async_callback(cancelled, task)
    return mover


def _supervisor(
    weights: EngineWeights,
    membership: Memberships,
    writers: list[PausableWork[Any]],
    tiers: NodeTiers | None,
    *,
    clock: Clock,
    limits: NodeLimits,
) -> EngineSupervisor | None:
    node, config = membership.node, weights.config
    if node.role is Role.STORE:
        return None
    engine, host, env = engine_config(config, node.id), config.nodes[node.id].host, {}
    if isinstance(engine, VllmEngineConfig):
        env = engine_environment(engine, config.model, host)

    def make() -> EngineProcess:
        hello = EngineHello(config=weights.config, node_name=node.id, incarnation=node.incarnation)
        return EngineProcess(hello, start_s=config.service.start_s, on_line=_pass_on, env=env)

    async def give_back(*, hangs: bool) -> None:  # they write in the node's name, too
        async with AsyncExitStack() as paused:
            for work in [*writers, *([tiers.promoter.work] if tiers is not None else [])]:
                await paused.enter_async_context(work.paused())
            await membership.release_writer(hangs=hangs)

    def ready(engine: EngineProcess) -> None:
        if tiers is not None:
            tiers.engine_ready(engine.info.kv_spec)
        membership.announce(engine.info.kv_spec)

    return EngineSupervisor(
        make,
        clock,
        on_ready=ready,
        on_end=partial(give_back, hangs=False),
        on_hung=partial(give_back, hangs=True),
        limits=limits,
    )


def _pass_on(line: str) -> None:
    """Put a log line of the engine's process into our own log."""
    sys.stderr.write(line + "\n")


def _connected(config: ClusterConfig, stack: AsyncExitStack, clock: Clock, trust: ClusterTrust) -> MetadataClient:
    client = connect_client(endpoints_of(config.metadata_server), clock, trust)
    stack.push_async_callback(client.aclose)
    return client


def _gate(trust: ClusterTrust, clock: Clock, host: str, port: int) -> ProvenCalls | CertifiedCalls | None:
    if trust.certificate is not None:
        return CertifiedCalls()
    return None if trust.secrets is None else ProvenCalls(RequestVerifier(trust, clock, authorities_of(host, port)))


async def _serve(
    api: ControlApi,
    gate: ProvenCalls | CertifiedCalls | None,
    listener: socket.socket,
    lifecycle: Lifecycle,
    *,
    metrics: NodeMetrics,
    trust: ClusterTrust,
) -> None:
    runner, tls, certificate = api.runner(gate), None, trust.certificate
    if certificate is not None:
        lifecycle.tasks.create_task(certificate.follow(), name="certificate")
        tls = certificate.server
    show_gates(metrics.metrics, {"node": runner.gate})
    await runner.setup()
    lifecycle.stack.push_async_callback(runner.cleanup)
    site = web.SockSite(runner, listener) if tls is None else TlsSite(runner, listener, tls)
    await site.start()
