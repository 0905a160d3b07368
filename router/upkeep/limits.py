"""Bounds of what operators ask about the cache, in one struct that tests may change. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UpkeepLimits:
    """Times in seconds."""

    find_s: float = 5.0
    """For one look at the tiers, or one order about a prompt's chunks."""
    list_s: float = 15.0
    """For listing generations: a server of ten million keys is looked through in part."""
    clear_s: float = 120.0
    """For clearing them; what is left is cleared by asking again."""
    reply_s: float = 2.0
    """A node answers so much later at most."""
    prefetch_s: float = 60.0
    """For bringing one prompt from tiers into memory."""
    warm_poll_s: float = 0.05
    """Between two looks for a prefiller that has nothing else to do."""
    keys_a_call: int = 16_384
    """Of chunks in one call to the metadata server."""
    longest_s: float = 366 * 86_400.0
    """The longest time that the metadata server takes: what never ends in tiers ends in memory after it."""
