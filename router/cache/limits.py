"""Bounds of what a router remembers of prompts, in one struct that tests may change. Values only."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """Memory and processor time of watching. At the defaults 40 MiB and one percent of a core, at most."""

    known_prefixes: int = 1 << 20
    """Beginnings of prompts that are known, a power of two; 8 bytes each. Newer ones take the places of older ones."""
    tokens_per_s: float = 400_000.0
    """Prompt tokens looked at a second; of more prompts only the cached tokens are counted. 20 to 30 ns a token."""
