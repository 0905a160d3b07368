"""Bounds of proofs. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProofLimits:
    """Of whoever checks proofs of requests."""

    skew_s: float = 30.0
    """How far the sender's clock and ours may be apart, the way of the request included."""
    max_nodes: int = 16_384
    """Of a cluster, alive at a time."""
    senders_per_node: int = 32
    """A node's process has up to 5 clients of a server, each of its engine's processes 2."""
    window: int = 65_536
    """A request of a sender that so many of its later ones have overtaken is refused."""
    max_seen_bytes: int = 256 << 20
    """For remembering requests. At the bound fewer of each sender's numbers are remembered: 900 where there are as many
    senders as may be."""
    sender_bytes: int = 256
    """Of that, for one sender beside its numbers."""

    @property
    def max_senders(self) -> int:
        """Clients whose requests are remembered, so that none is taken twice; those of more at a time are refused."""
        return self.max_nodes * self.senders_per_node
