"""Bounds of every call of ours. Values; tests pass changed ones."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Sizes in bytes."""

    max_head_bytes: int = 64 << 10
    """Of an answer: its line and headers, those of answers before it that say nothing yet (1xx) included."""
    max_unread_bytes: int = 256 << 10
    """Of an answer that its reader has not taken: from there on nothing more is read from the connection."""
    max_rest_bytes: int = 64 << 10
    """Of an answer that nobody reads on, for its connection's sake; a longer one ends it."""
    rest_s: float = 2.0
    """A server has so long to end an answer of which nobody wants more, and of which no more should come."""
    fallback_s: float = 0.25
    """When the next address of a name is tried beside the one before it."""
