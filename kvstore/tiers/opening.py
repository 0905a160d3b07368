"""Which module opens the tier of each section of a cluster file. A new kind of tier is a row here."""

import importlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import cast

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.config.tiers import DiskTierConfig, MooncakeTierConfig, ObjectTierConfig, RedisTierConfig, TierConfig
from kvcore.eviction.quotas import TenantShares
from kvstore.tiers.base import Tier

_MODULES: dict[type[TierConfig], str] = {
    DiskTierConfig: "kvstore.tiers.disk",
    RedisTierConfig: "kvstore.tiers.places.opening",
    ObjectTierConfig: "kvstore.tiers.objects.tier",
    MooncakeTierConfig: "kvstore.tiers.mooncake.tier",
}


@dataclass(frozen=True, slots=True)
class TierPlace:
    """Whose tier it is to be."""

    cluster: str
    node_id: str
    host: str
    """The address by which other machines reach the node."""
    segment: memoryview
    """The node's segment, from and to which chunks go: a client may have to be told of it."""
    pin_share: float = 0.5
    """Of what is the node's alone, that pinned chunks may take."""
    shares: TenantShares | None = None
    """Of what is the node's alone, that tenants' chunks may take; None: any."""


TierOpener = Callable[[TierConfig, TierPlace, Clock], Awaitable[Tier]]
"""`open_tier` of each module. It raises ConfigError for what cannot be; a server that is away now is no error."""


def configured(config: ClusterConfig, node_id: str) -> Iterator[TierConfig]:
    """The tiers of one node: the cluster's, with the disk that the node itself names."""
    tiers, node = config.tiers, config.nodes[node_id]
    for tier in (node.disk or tiers.disk, tiers.redis, tiers.object, tiers.mooncake):
        if tier is not None:
            yield tier


async def open_tier(config: TierConfig, place: TierPlace, clock: Clock) -> Tier:
    """Raises ConfigError that names the section and what to do."""
    module = importlib.import_module(_MODULES[type(config)])
    return await cast(TierOpener, module.open_tier)(config, place, clock)
