"""Opens what a cluster file says of one node's tiers, on the clock, the clients and the segment of its service."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.tenants.shares import FollowedShares
from kvcore.trust.opening import OPEN, ClusterTrust
from kvnode.partitions.memberships import Memberships
from kvnode.segment_owner import SegmentOwner
from kvnode.tasks import cancelled, spawned
from kvnode.tiers.node_tiers import NodeTiers, OpenTier, open_node_tiers
from kvnode.tiers.own_segment import OwnSegment
from kvnode.tiers.peers import PeerDisks
from kvstore.integrity.checks import Integrity
from kvstore.placement import Placement
from kvstore.settings import chosen_verify
from kvstore.tiers.opening import TierPlace, configured, open_tier
from metadata_server.client import MetadataClient
from metadata_server.connect import connect_subscription, endpoints_of
from nodeapi.client import HttpNodeClient


@asynccontextmanager
async def start_tiers(
    config: ClusterConfig,
    membership: Memberships,
    owner: SegmentOwner,
    metadata: MetadataClient,
    clock: Clock,
    *,
    trust: ClusterTrust = OPEN,
) -> AsyncIterator[NodeTiers | None]:
    """The node's tiers until it is left; None if it has none. Raises ConfigError for one that cannot be opened."""
    node = membership.node
    sections = list(configured(config, node.id))
    if not sections:
        yield None
        return
    async with AsyncExitStack() as stack:
        host = config.nodes[node.id].host
        store = config.store
        followed = await asyncio.to_thread(FollowedShares, config, trust.secrets)
        stack.push_async_callback(cancelled, spawned(followed.follow(), "tenants-shares"))
        place = TierPlace(config.cluster, node.id, host, owner.view, store.pin_share, followed.shares)
        opened = []
        for section in sections:
            tier = await open_tier(section, place, clock)
            stack.push_async_callback(tier.aclose)
            opened.append(OpenTier(tier, section))
        client = HttpNodeClient(connect_timeout_s=config.router.connect_timeout_s, max_connections=64, trust=trust)
        stack.push_async_callback(client.aclose)
        verify = chosen_verify(config)
        verify = "checksum" if verify == "header" else verify  # what a tier gives is checked
        integrity = Integrity(verify, trust.secrets, encrypt=config.kv.encrypt)
        placement = Placement(metadata, node_id=node.id, incarnation=node.incarnation, clock=clock, config=store)
        tiers = await stack.enter_async_context(
            open_node_tiers(
                opened,
                config.tiers,
                shares=followed.shares,
                node=node,
                host_id=owner.segment.host_id,
                segment=OwnSegment(owner.view, owner.segment.id, placement, integrity),
                placement=placement,
                metadata=metadata,
                clock=clock,
                run_blocking=asyncio.to_thread,
                peers=PeerDisks(metadata, client, node.id),
            )
        )
        membership.on_registered(tiers.registered)
        endpoints = endpoints_of(config.metadata_server)
        subscription = connect_subscription(endpoints, tiers.filler.sink_of, clock, trust)
        stack.push_async_callback(subscription.aclose)
        following = spawned(subscription.run(), "follow-events")
        stack.push_async_callback(cancelled, following)
        yield tiers
