"""Times of the Mooncake tier that are no matter of a cluster file. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MooncakeLimits:
    """Of one node's client of Mooncake."""

    setup_s: float = 10.0
    """For the client to start, with `setup_gib_s` more for each GiB that it registers. Mooncake itself tries to reach a
    silent master for 90 s."""
    setup_gib_s: float = 1.0
    retry_s: float = 1.0
    """After a client could not be set up, or ended, before the next is started."""
    hung_s: float = 10.0
    """A client is replaced if calls that were given up so long ago hang and it answered none since. By then a master
    that stood still has forgotten what the client lent (its client_ttl is 10 s)."""
    look_s: float = 1.0
    """Between two looks for that."""
    close_s: float = 3.0
    """For the client to take its memory back from Mooncake in order (1.3 s, measured); then it is killed."""
    load_tries: int = 3
    """Of a chunk that took longer to read than Mooncake lets it lie where it is."""
    threads: int = 8
    """Calls that the client has under way at once: one to a master that is gone takes 4.5 s to fail."""
