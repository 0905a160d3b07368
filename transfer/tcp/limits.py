"""Bounds and pauses of the TCP transport."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TcpLimits:
    """Of one host, and of the sockets at both ends."""

    max_connections: int = 256
    """To one host; more are closed at once."""
    max_per_peer: int = 192
    """Of these from one address, so that others get one."""
    idle_timeout_s: float = 600.0
    """Between two requests on one connection."""
    message_timeout_s: float = 30.0
    """For each step of a message that began, and for the whole of it beyond what its payload takes at …"""
    slowest_bytes_per_s: int = 1 << 20
    """… this rate: a peer that sends or takes a byte now and then is cut."""
    greeting_s: float = 5.0
    """For a whole greeting in a cluster with a secret: a stranger holds a connection no longer."""
    goodbye_s: float = 1.0
    """For telling a peer why its connection is closed."""
    accept_pause_s: float = 0.1
    """Before another try, where no connection could be accepted (out of descriptors, say)."""
    close_s: float = 5.0
    """For a host's threads to end."""
    keepalive_idle_s: int = 3
    keepalive_interval_s: int = 1
    keepalive_probes: int = 3
    """A connection without traffic whose peer answers none of these probes is broken."""
    unacknowledged_s: float = 6.0
    """Bytes that the peer has not acknowledged for so long break the connection. Longer than five losses of the same
    packet one after the other take."""
    late_s: float = 1.0
    """What a host's kernel had received when its peer cut a connection is in the segment within this."""
