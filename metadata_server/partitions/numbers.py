"""Numbers that say which partition they are of: ids of reservations and leases, and one number for several leases.

Pure. A server's ids are, modulo the number of partitions, its own number (`Protocols.numbering`). The lease of a prefix
that lies in several partitions is one of each; their ids stand in one number, 64 bits each.
"""

from collections.abc import Iterable, Iterator

_BITS = 64


def packed(lease_ids: Iterable[int]) -> int:
    """One number for these ids, each more than 0; 0 for none, and an id by itself is its own."""
    number = 0
    for at, lease_id in enumerate(lease_ids):
        number |= lease_id << (_BITS * at)
    return number


def unpacked(number: int) -> Iterator[int]:
    """The ids again."""
    while number:
        yield number & ((1 << _BITS) - 1)
        number >>= _BITS
