"""Bounds of every HTTP server of ours. Values; tests pass changed ones."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Times in seconds."""

    max_connections: int | None = None
    """Requests on connections beyond are refused, before the descriptors are used up. None: as many as those allow."""
    listeners: int = 1
    """Of the process, which share that."""
    max_per_client: int | None = None
    """Of one address. None: the share …"""
    client_share: float = 0.8
    """… that one client may have of the connections and of `max_held_bytes`."""
    accept_again_s: float = 1.0
    """After there was no descriptor for a connection."""
    max_spare: int = 32
    """Connections over a bound that wait for their head, or are told so: see `http_gate`."""
    spare_head_s: float = 2.0
    """What `head_s` and `handshake_s` are for those."""
    max_head_bytes: int = 64 << 10
    """Of a request's head: its line and its headers."""
    handshake_s: float = 15.0
    """A connection whose TLS does not stand by then is closed."""
    head_s: float = 30.0
    """A connection that has sent no whole head of a request by then is closed."""
    max_held_bytes: int = 256 << 20
    """Of bodies that are not whole yet, of all connections."""
    body_s: float = 60.0
    """A body that is not whole by then ends its connection, whether or not anybody reads it."""
    send_s: float = 60.0
    """A client that takes nothing of an answer for so long is cut."""
    look_s: float = 0.01
    """A server that ends looks so often whether what is under way is over."""
    close_s: float = 2.0
    """What was cut at the end of a drain has this long to end in order."""

    def holding(self, num_bytes: int) -> "HttpLimits":
        """These, with so many bytes of bodies at least."""
        return replace(self, max_held_bytes=max(self.max_held_bytes, num_bytes))
