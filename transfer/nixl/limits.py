"""Bounds and pauses of the NIXL transport."""

from dataclasses import dataclass

from transfer.handover import HandoverLimits


@dataclass(frozen=True, slots=True)
class NixlLimits:
    """Of one initiator, and of one host."""

    handover: HandoverLimits = HandoverLimits()
    max_peers: int = 256
    """Connections of one initiator; the one that was idle longest is closed for a new one."""
    max_connections: int = 256
    """Connections to one host."""
    max_greetings: int = 4
    """Of one connection, that a host knows: an initiator that gave one up begins another on the same."""
    window_bytes: int = 256 << 20
    window_requests: int = 64
    """In NIXL's hands at once, of all batches."""
    batch_requests: int = 2
    """Of one batch: the next is handed over while one moves."""
    spin_s: float = 50e-6
    """How long the thread looks before it naps: an answer over a fast network takes less than a nap."""
    nap_s: float = 30e-6
    """Between two looks while something moves."""
    idle_s: float = 0.5
    """Between two looks while nothing moves."""
    listen_s: float = 0.2
    """How often messages are collected while no peer has still to answer."""
    greet_again_s: float = 0.1
    """A greeting is sent again until it was answered: sending is also how a dead peer shows."""
    connect_s: float = 5.0
    """A connection that is older without an answer, and on which a batch ended, is given up for a fresh one."""
    others_s: float = 1.0
    """What the other batches of an agent that must be closed may still take."""
    drain_s: float = 0.5
    """For batches to end in order before everything is cut."""
    max_retiring: int = 4
    """Agents that wait for their last batches before they are closed."""
    look_s: float = 0.02
    """What a greeting may wait at a host: NIXL has nothing that could wake us. An idle host costs 0.9 % of a (busy)
    processor."""
    prove_s: float = 5.0
    """For an agent that greeted a host to prove that it knows the cluster's secret: else its place is another's."""
    sweep_s: float = 1.0
    """How often a host looks for connections that are broken."""
    close_s: float = 10.0
    """For a host's thread to end."""
