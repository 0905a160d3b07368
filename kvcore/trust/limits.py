"""Bounds of proofs. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProofLimits:
    """Of whoever checks proofs of requests."""

    skew_s: float = 30.0
    """How far the sender's clock and ours may be apart, the way of the request included."""
    max_senders: int = 4096
    """Processes whose requests are remembered, so that none is taken twice; more at a time are refused."""
    window: int = 65_536
    """A request of a sender that so many of its later ones have overtaken is refused."""
