"""Opens the Redis tier that a URL asks for: over one server, the master of a sentinels' service, or a cluster."""

from kvcore.clock import Clock, SystemClock
from kvcore.config.tiers import RedisTierConfig, TierConfig
from kvstore.tiers.base import Tier
from kvstore.tiers.limits import RedisLimits
from kvstore.tiers.opening import TierPlace
from kvstore.tiers.places.cluster import RedisClusterTier, redis_tier
from kvstore.tiers.places.discovery import ClusterSlots, SentinelMaster, ServerPlace
from kvstore.tiers.places.redis_url import RedisPlaces, parse_redis_url


async def open_tier(config: TierConfig, place: TierPlace, clock: Clock) -> Tier:
    """See `kvstore.tiers.opening`. Connects when it is first asked."""
    assert isinstance(config, RedisTierConfig)
    return open_redis(config.url, config.connections, clock)


def open_redis(url: str, connections: int, clock: Clock, limits: RedisLimits = RedisLimits()) -> Tier:
    """The tier at this URL. Raises ConfigError."""
    where = parse_redis_url(url)
    if not isinstance(where, RedisPlaces):
        return redis_tier(where, connections, clock, limits)
    if where.kind == "sentinel":
        return redis_tier(SentinelMaster(where), connections, clock, limits)
    return RedisClusterTier(ClusterSlots(where, clock, rediscover_s=limits.rediscover_s), connections, clock, limits)


async def redis_servers(url: str, timeout_s: float) -> list[ServerPlace]:
    """The servers that have the chunks now: several of a cluster. Raises ConfigError; OSError where nobody says."""
    where = parse_redis_url(url)
    if not isinstance(where, RedisPlaces):
        return [where]
    if where.kind == "sentinel":
        master = SentinelMaster(where)
        return [await master.find(timeout_s)]
    slots = ClusterSlots(where, SystemClock(), rediscover_s=0)
    await slots.refresh(timeout_s)
    return list(slots.masters())
