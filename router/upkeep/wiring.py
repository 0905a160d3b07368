"""The one place where the parts of this package are put together."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from fastapi import FastAPI

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from metadata_server.client import MetadataClient
from nodeapi.client import HttpNodeClient
from nodeapi.protocol import NodeClient
from router.answering import Answerer
from router.nodes.cluster import Cluster
from router.upkeep.anywhere import TierSight
from router.upkeep.generations import ClusterGenerations
from router.upkeep.limits import UpkeepLimits
from router.upkeep.lookup import PromptsLookup
from router.upkeep.memory import SegmentOrders
from router.upkeep.nodes import KeepingNodes, UpkeepClient
from router.upkeep.orders import ChunkOrders
from router.upkeep.prefetching import PromptPrefetcher
from router.upkeep.routes import UpkeepRoutes, add_refusals
from router.upkeep.warming import PromptWarmer
from router.upkeep.weights import ClusterWeights


class FullClient(NodeClient, UpkeepClient, Protocol):
    """All calls to nodes that are ours."""


def make_upkeep(
    config: ClusterConfig,
    cluster: Cluster,
    client: FullClient,
    *,
    metadata: MetadataClient,
    answerer: Answerer,
    probe: Callable[[], Awaitable[None]],
    clock: Clock,
    limits: UpkeepLimits = UpkeepLimits(),
) -> UpkeepRoutes:
    """The routes, with all that answers them. `probe` asks all nodes for their reports."""
    nodes, memory = KeepingNodes(cluster, client, limits), SegmentOrders(metadata, limits)
    return UpkeepRoutes(
        answerer=answerer,
        lookup=PromptsLookup(cluster, nodes),
        orders=ChunkOrders(cluster, nodes, memory),
        warmer=PromptWarmer(config.router, cluster, client, clock, limits),
        prefetcher=PromptPrefetcher(cluster, client, clock, limits),
        generations=ClusterGenerations(cluster, nodes, memory, limits),
        weights=ClusterWeights(cluster, nodes, probe, clock, start_s=config.service.start_s, limits=limits),
        max_body_bytes=int(config.router.max_body),
    )


def tier_sight(
    cluster: Cluster, client: UpkeepClient, metadata: MetadataClient, limits: UpkeepLimits = UpkeepLimits()
) -> TierSight:
    """What lies in tiers and is nobody's."""
    nodes = KeepingNodes(cluster, client, limits)
    return TierSight(cluster, nodes, ClusterGenerations(cluster, nodes, SegmentOrders(metadata, limits), limits))


def upkeep_routes(
    config: ClusterConfig,
    cluster: Cluster,
    client: NodeClient,
    *,
    metadata: MetadataClient | None,
    answerer: Answerer,
    probe: Callable[[], Awaitable[None]],
    clock: Clock,
) -> Callable[[FastAPI], None]:
    """Adds the routes to an application; of servers that are not ours, which have no store, routes that say so."""
    if isinstance(client, HttpNodeClient) and metadata is not None:
        made = make_upkeep(config, cluster, client, metadata=metadata, answerer=answerer, probe=probe, clock=clock)
        return made.add_to
    return add_refusals
