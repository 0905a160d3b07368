"""Bounds and pauses of the store. What is in the cluster file is not here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Of one KVStore."""

    close_s: float = 2.0
    """For work in the background to end when the store closes, and for writes under way when a session closes."""
    max_background_tasks: int = 64
    writable_share: float = 0.9
    """Of a reservation's life: no byte is written after it, so that clocks and wires may be late by the rest."""
    longest_wait_s: float = 60.0
    """Of one long poll: a server takes no arbitrary ones."""
    retry_pauses_s: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Longer than the client's own pause after a failure; give-backs are idempotent, and a place or a lease that stays
    taken until it expires is missed by others."""
    more_retries: int = 60
    """Of giving back, each after the longest of these pauses: a server that hung for a minute holds it, or grants it
    even, when it goes on."""
    renew_share: float = 0.3
    """Of a read lease's life: a transfer that goes on for longer renews it, and again after each such time."""
    max_give_back: int = 4096
    """Leases or reservations in one call that gives them back."""
    first_pause_s: float = 0.1
    """A segment that failed is left alone for so long; it doubles with each further failure …"""
    longest_pause_s: float = 2.0
    """… up to this."""
    max_paused_segments: int = 1024
    inline_hash_bytes: int = 8 << 20
    """Hashing 8 MiB blocks the loop for 0.13 ms (hot) to 0.3 ms (cold); handing it to a thread takes 0.2 ms more."""
    hash_first_bytes: int = 1 << 20
    """Up to here a batch is hashed before it is written, in 30 us, and written in one round: a second round for the
    headers costs more."""
    inline_cipher_bytes: int = 1 << 20
    """Encrypting or opening 1 MiB blocks the loop for about 0.1 ms."""
    scratch_slot_bytes: int = 8 << 20
    """What is encrypted before it is moved goes by way of slots of so many bytes, or of one chunk's if that is more."""
    scratch_bytes: int = 32 << 20
    """Of all slots that are kept, and that writes to one segment use at a time; two there are always: one is encrypted
    into while another is moved."""
