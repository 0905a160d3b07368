"""Bounds and pauses around a tier that are no matter of a cluster file. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierLimits:
    """Of one tier, in one process."""

    failures: int = 3
    """Calls in a row that find the tier unavailable before it is left alone for a while."""
    pause_s: float = 0.5
    """The first time that it is left alone; then twice as long each time, ..."""
    longest_pause_s: float = 3.0
    """... up to this: soon after its return a tier is in use again."""
    rate_weight: float = 0.2
    """Of the last call, in the running estimate of bytes a second."""


@dataclass(frozen=True, slots=True)
class RedisLimits:
    """Of a tier in a Redis or Valkey."""

    part_bytes: int = (4 << 20) - 4096
    """Of a chunk in one value. With its header a value stays below 4 MiB: Redis rounds one of 4 MiB up to 5, and one of
    7 MiB or more costs its server three times the processor time."""
    gets_under_way: int = 4
    """On one connection: a server keeps answers that are not read yet in memory, outside of its maxmemory."""
    enough_bytes: int = 2 << 20
    """A connection writes so much, a part at least, before it waits for the answer: what lies in sockets is then still
    in the processor's cache when the server reads it, and writing costs a tenth less of its time."""
    group_bytes: int = 16 << 20
    """Of chunks whose parts are written before the first of them is committed."""
    max_chunk_bytes: int = 1 << 30
    """Header and payload."""
    scan_keys: int = 1000
    """Of the server's keys in one page, where all are looked through."""
    max_generations: int = 4096
    """That are listed; a server that many share has a few."""
    rediscover_s: float = 0.5
    """A cluster is asked at most so often which of its nodes has what."""
    redirections: int = 2
    """Of one call to a cluster's nodes."""
    note_s: float = 90 * 24 * 3600.0
    """How long a note on a generation outlives its last mark."""


@dataclass(frozen=True, slots=True)
class ObjectLimits:
    """Of a tier in a bucket or a folder."""

    questions: int = 32
    """At once: whether an object is there."""
    max_chunk_bytes: int = 1 << 30
    """Header and payload."""
    close_s: float = 1.0
    """For calls that nobody waits for any more, when the tier is closed."""
    max_remembered: int = 4096
    """Objects whose sizes are known from having been found."""
    page_objects: int = 1000
    """That are listed, or removed, by one request."""
    max_generations: int = 4096
    """That are listed; a bucket that many share has a few."""
