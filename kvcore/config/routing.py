"""What a cluster file says of how the router chooses nodes. See `kvcore.config.schema`."""

from enum import StrEnum


class RoutingPolicy(StrEnum):
    """How the router chooses."""

    PREFIX_AWARE = "prefix_aware"
    """Least outstanding work plus what would have to be brought over from other nodes."""
    LEAST_LOADED = "least_loaded"
    """Least outstanding work, whatever is cached where."""
    POWER_OF_TWO = "power_of_two"
    """The less loaded of two nodes drawn by lot: for many routers, which see each other's load late."""
    CONSISTENT_HASH = "consistent_hash"
    """Requests of one session (`prompt_cache_key` or `session_id`), else with one beginning, to one node while
    it is not much fuller than the others."""
    ROUND_ROBIN = "round_robin"
    """Each node in turn, whatever is cached where."""
