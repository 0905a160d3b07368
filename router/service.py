"""Wires the router of one cluster file, and runs it until told to stop. The only place that knows all parts."""

import asyncio
import logging

from kvcore.clock import SystemClock
from kvcore.config.schema import ClusterConfig, HandoffKind
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.ports import base_url
from kvcore.process.asgi import AsgiServer
from kvcore.process.service import Lifecycle
from kvcore.telemetry import log_fields
from metadata_server.client import MetadataClient
from metadata_server.http_transport import HttpEventSource, HttpMetadataTransport
from metadata_server.subscription import IndexSubscription
from nodeapi.client import HttpNodeClient
from nodeapi.protocol import NodeClient
from router.answering import Answerer
from router.api.app import make_app
from router.metrics import RouterMetrics
from router.nodes.cluster import Cluster
from router.nodes.vllm_client import VllmClient, server_key
from router.nodes.vllm_model import read_model_facts
from router.requests.dispatch import Dispatcher
from router.requests.records import RequestLog
from router.routing.policy import make_policy
from router.status import StatusView
from router.text.tokenizer import make_tokenizer, run_in_thread

STATS_INTERVAL_S = 1.0
LEGS_PER_REQUEST = 3
"""Connections of one request at most in the usual case: both legs and a control call."""
_log = logging.getLogger("router")


async def run_router(config: ClusterConfig, lifecycle: Lifecycle) -> None:
    """Serve until `lifecycle.stopping`, then drain. Neither nodes nor metadata server need be up.

    Raises ModelLoadError (no tokenizer) or ConfigError (the port is in use).
    """
    tokenizer = await asyncio.to_thread(make_tokenizer, config)
    clock, bounds = SystemClock(), config.router
    client = await _make_client(config)
    lifecycle.stack.push_async_callback(client.aclose)
    cluster = Cluster(config, client, clock)
    log = RequestLog()
    dispatcher = Dispatcher(
        config=bounds,
        cluster=cluster,
        policy=make_policy(bounds.policy),
        client=client,
        clock=clock,
        log=log,
        handoff=config.handoff,
    )
    lifecycle.stack.push_async_callback(dispatcher.aclose)
    subscription = _make_subscription(config, cluster, lifecycle)
    connected = None if subscription is None else lambda: subscription.connected
    status = StatusView(config, cluster, log, clock, connected)
    metrics = RouterMetrics(cluster, log, connected)
    answerer = Answerer(
        model=config.model.name, tokenizer=tokenizer, dispatcher=dispatcher, cluster=cluster, run=run_in_thread
    )
    app = make_app(answerer, log, status, metrics, max_body_bytes=bounds.max_body)
    server = AsgiServer(app, bounds.host, bounds.port)
    lifecycle.tasks.create_task(cluster.run(), name="node probes")
    if subscription is not None:
        lifecycle.tasks.create_task(subscription.run(), name="index subscription")
        lifecycle.tasks.create_task(_follow_stats(_make_metadata(config, lifecycle), status), name="segment use")
    await server.start()
    lifecycle.stack.push_async_callback(server.aclose)
    lifecycle.tasks.create_task(server.wait_failed(), name="http server")
    lifecycle.ready(url=server.url, policy=bounds.policy, nodes=len(config.nodes), handoff=config.handoff)
    await lifecycle.stopping.wait()
    await server.drain(config.service.drain_s)


async def _make_client(config: ClusterConfig) -> NodeClient:
    max_connections = LEGS_PER_REQUEST * config.router.max_requests + len(config.nodes)
    if config.handoff is HandoffKind.KVFERRY:
        return HttpNodeClient(connect_timeout_s=config.router.connect_timeout_s, max_connections=max_connections)
    facts = await asyncio.to_thread(read_model_facts, config)
    return VllmClient(config, facts, max_connections=max_connections, api_key=server_key())


def _make_subscription(config: ClusterConfig, cluster: Cluster, lifecycle: Lifecycle) -> IndexSubscription | None:
    """None where no metadata server is: servers that are not ours keep no store."""
    if config.handoff is not HandoffKind.KVFERRY:
        return None
    source = HttpEventSource(base_url(config.metadata_server.host, config.metadata_server.port))
    lifecycle.stack.push_async_callback(source.aclose)
    return IndexSubscription(source, cluster, SystemClock())


def _make_metadata(config: ClusterConfig, lifecycle: Lifecycle) -> MetadataClient:
    server = config.metadata_server
    transport = HttpMetadataTransport(base_url(server.host, server.port))
    lifecycle.stack.push_async_callback(transport.aclose)
    return MetadataClient(transport, SystemClock(), server.timeout_s)


async def _follow_stats(metadata: MetadataClient, status: StatusView) -> None:
    """Keep the segments' use at hand for /v1/cluster. Away: what was last known is forgotten."""
    while True:
        try:
            stats = await metadata.stats()
            status.used_bytes = {item.segment.id: item.used_bytes for item in stats.segments}
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            status.used_bytes = {}
            log_fields(_log, logging.DEBUG, "no_segment_stats", error=error.message)
        await asyncio.sleep(STATS_INTERVAL_S)
