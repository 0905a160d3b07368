"""Bounds and pauses of a node that are no matter of a cluster file. Values; tests pass changed ones."""

from dataclasses import dataclass

from kvcore.process.limits import HttpLimits


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """Times in seconds."""

    http: HttpLimits = HttpLimits()
    """Of the control API's listener."""
    body_s: float = 30.0
    """A request's body arrives within this."""
    late_s: float = 5.0
    """Beyond the request's own deadline: for an engine that forgot it, or a client that does not read."""
    longest_deadline_s: float = 86_400.0
    """A leg may ask for no more."""
    longest_probe_s: float = 60.0
    """Nor a measurement."""
    close_s: float = 2.0
    """Connections of the control API that still have an answer under way, and room that a measurement gives back."""
    lease_first_backoff_s: float = 0.1
    """After the first failure of a heartbeat; each one doubles it, up to a heartbeat's period."""
    join_s: float = 10.0
    """After its engine is ready a node that the metadata server, or a partition of it, does not know says for this long
    that it is not ready. Then it says that it is: it serves, and stores nothing there."""
    give_back_s: float = 1.0
    """What is given back to the metadata server is told it for this long; then it expires there."""
    engine_first_backoff_s: float = 0.2
    engine_longest_backoff_s: float = 5.0
    engine_healthy_s: float = 30.0
    """An engine that lived this long starts again without a pause that grew before."""
    piece_entries: int = 4096
    """Chunks in one piece of a manifest: 0.3 MB and about 10 ms of the metadata server's time."""
    spread_s: float = 1.0
    """After a restart of the metadata server each node waits for a random part of this before it sends the first."""
    longest_piece_pause_s: float = 2.0
    """Between tries to send a piece."""
    move_poll_s: float = 1.0
    """Between two looks whether the node is to copy its chunks elsewhere, or has more to copy."""
    move_bytes: int = 64 << 20
    """Copied at once, …"""
    move_share: float = 0.5
    """… in this share of the time at most: what it moves has the links to itself no longer than that."""
    most_copied: int = 256
    """Told of in one call: the metadata server looks at no more."""
    move_writable_share: float = 0.5
    """Of a reservation's time: nothing is written into its room later."""
    max_listed: int = 65_536
    """Chunks told to a metadata server of before IN_PIECES, which takes all at once and refuses longer bodies. What is
    not listed is free room there."""
