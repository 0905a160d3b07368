"""Bounds and pauses of the metadata server and of its clients. What is in the cluster file is not here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Of MetadataCore and its HTTP shell."""

    max_waiters: int = 5120
    max_waiters_per_node: int = 2048
    """Twice what a client of ours has under way."""
    max_waiters_per_owner: int = 4096
    """For the prompts of one tenant: four fifths."""
    most_reserved: int = 524_288
    """Chunks that a node is granted in a row, eight segments full of most; and then …"""
    reserved_per_s: float = 100_000.0
    """… so many: 1.6 million tokens in chunks of 16. A server takes 160,000, of all nodes together."""
    most_registrations: int = 64
    """Of a node in a row, as where its engine or network comes and goes; and then …"""
    registrations_per_s: float = 1.0
    """… so many."""
    max_registering: int = 65_536
    """Nodes whose registrations are counted, those that registered last."""
    max_subscribers: int = 256
    max_subscribers_per_client: int = 224
    """Of one address, so that routers elsewhere get a stream."""
    max_encoded_batches: int = 64
    """Of events, each of up to 80 kB: kept for the other subscribers."""
    keep_alive_s: float = 1.0
    """A subscriber hears something at least so often."""
    shortest_sleep_s: float = 0.01
    pulse_s: float = 1.0
    """The ticking task runs at least so often …"""
    stall_s: float = 1.0
    """… and so much later than that means that this process was stopped."""
    body_s: float = 30.0
    """For a request's body to arrive."""
    send_s: float = 10.0
    """For a subscriber to take one batch."""
    small_body: int = 16_384
    """Bytes. Registrations and pieces of manifests that are longer are looked at in turn. With so many waiting, …"""
    max_in_turn: int = 128
    """… each of some 300 kB, a further piece is to be sent again after …"""
    again_s: float = 1.0
    """… this."""
    refused_s: float = 60.0
    """A node that was refused is listed for so long after it last asked; of many, …"""
    max_refused: int = 64
    """… those that asked last."""


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Of MetadataClient, IndexSubscription and their ways over HTTP."""

    first_pause_s: float = 0.1
    """After a failure nothing is tried for so long; it doubles with each further failure …"""
    longest_pause_s: float = 1.0
    """… up to this."""
    quick_s: float = 0.3
    """A call that a request may wait for has this long, or …"""
    quick_factor: float = 4.0
    """… so many times what such calls took of late, …"""
    quick_byte_s: float = 5e-6
    """… and this for each byte of its body (a batch of 8,000 keys took 1.6 s), …"""
    known_answers: int = 8
    """… once so many were answered; …"""
    unknown_share: float = 0.4
    """… before that this share of the time that any call has: a process that starts while the server hangs learns it
    from a request that waits for it."""
    pace_decay: float = 0.99
    """With each answer what was slow counts for so much less."""
    late_factor: float = 4.0
    """After a call that was late nothing is tried for so many times its limit …"""
    longest_late_pause_s: float = 2.0
    """… up to this."""
    max_connections: int = 256
    max_waits: int = 1024
    """Long polls under way, each on a connection of its own beside those. A further one asks once, after …"""
    wait_poll_s: float = 0.25
    """… so long, and has to be repeated: no wait may keep other calls from the server, or cost all descriptors."""
    piece_s: float = 8.0
    """For a piece of a manifest beyond a call's own time, as the server looks at one at a time."""
    give_back_pauses_s: tuple[float, ...] = (0.0, 0.5, 2.0, 5.0)
    """Before each try to give a partition a lease back that its caller does not know of; of so many at once, …"""
    max_give_backs: int = 1024
    """… a further one expires."""
    idle_connection_s: float = 3.0
    """Shorter than the server's, so that a request does not meet a closing connection."""
    max_frame_bytes: int = 64 << 20
    silence_s: float = 5.0
    """Of an event stream: five keep-alives."""
