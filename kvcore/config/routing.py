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


class DecoderPrefill(StrEnum):
    """When a decoder computes an uncached rest that is long enough for a prefiller."""

    FASTER = "faster"
    """Where that is expected to take less time, by what was measured of both ways; and where a prefiller's KV is long
    overdue."""
    NEEDED = "needed"
    """When no prefiller can, or has within `prefill_timeout_s`: prompts disturb a decoder's streams the least."""
