"""Bounds and pauses around the node's tiers that are no matter of a cluster file. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MoveLimits:
    """Of one node."""

    max_queued: int = 16_384
    """Chunks that wait for one tier; more are not saved there, and counted. They lie in the segment meanwhile."""
    max_remembered: int = 262_144
    """Chunks of which it is known that a tier has them, or that a prompt came once."""
    batch_chunks: int = 16
    """Of one save or load."""
    batch_bytes: int = 32 << 20
    """Of one save or load; one chunk at least."""
    find_s: float = 0.25
    """For asking tiers what they have, at least: this is added to a prompt that is in none."""
    find_share: float = 0.1
    """Of the time in which the prompt would be computed, where that is longer."""
    first_find_s: float = 1.0
    """While nobody knows how long computing takes."""
    retry_s: float = 1.0
    """After a tier was away or the metadata server did not answer, before the same chunks are tried again."""
    announce_keys: int = 4096
    """Of a disk's chunks in one call to the metadata server."""
    announce_s: float = 0.2
    """At most so long after a chunk came to the disk or left it the metadata server is told."""
    explore: int = 16
    """Of so many prompts that would be computed faster than loaded, one is loaded: what was slow may have changed."""
    warm_pause_s: float = 0.02
    """Between two batches of a warm-up: requests come first."""
    close_s: float = 1.0
    """For what is under way when the node stops."""
    mark_s: float = 300.0
    """Between two times that the node says in shared tiers which KV it uses."""
    mark_ttl_s: float = 900.0
    """For which each of them holds."""
