"""Bounds and pauses of Mooncake's dialect. What is in the cluster file is not here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DialectLimits:
    """Values; tests pass changed ones."""

    max_key_bytes: int = 384
    """With what we put in front of it, it fits a record's key."""
    body_s: float = 10.0
    """For a value to arrive. Mooncake's clients give up after 3 s."""
    pulse_s: float = 0.5
    """Owners are looked at so often …"""
    probes_at_once: int = 128
    """… and at most so many are asked then."""
    probe_s: float = 1.0
    """For a connection to an owner's port, and for its answer."""
    first_probe_s: float = 0.5
    """After it has registered an owner is asked; its port opens right after that. Until it has answered it is asked
    again after twice the time, up to the setting."""
    young_s: float = 10.0
    """An owner that we have known for less may not listen yet: its port may refuse for …"""
    settle_s: float = 1.5
    """… so long before another one gets its name. A client waits 3 s for the answer."""
    again_s: float = 0.25
    """Between two of those looks."""
    listing_s: float = 30.0
    """Between two looks at which records there are."""
    put_tries: int = 16
    """Of one write, while others write the same key."""
