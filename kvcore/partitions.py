"""Which of several metadata servers knows a chunk, and which slice of a segment each may give out. Pure.

Rendezvous hashing: the first 12 bits of a key are its slot (keys are digests, so slots are even), and a slot belongs to
the partition whose name weighs most for it:

    weight(name, slot) = u64le(BLAKE2b(b"kvferry.part.v1" || u16le(slot) || name in UTF-8, 8 bytes))

Of equal weights that of the name which comes first counts. A partition that is added takes slots from every other one,
and one that is removed leaves them to all; no other slot moves. The published test vector is in docs/wire-formats.md.
"""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

import msgspec

from kvcore.extents import ALIGNMENT
from kvcore.types import ChunkKey

MAX_PARTITIONS = 64
_SLOTS = 1 << 12
_DOMAIN = b"kvferry.part.v1"


@lru_cache(maxsize=16)
def owners_of_slots(names: tuple[str, ...]) -> bytes:
    """The number of each slot's partition, by its place in `names`. Some milliseconds a name, once."""
    weights = [[_weight(name, slot) for slot in range(_SLOTS)] for name in names]
    return bytes(max(range(len(names)), key=lambda at: (of_slot[at], -at)) for of_slot in zip(*weights, strict=True))


def _weight(name: str, slot: int) -> int:
    digest = blake2b(_DOMAIN + slot.to_bytes(2, "little") + name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Partitions(msgspec.Struct, frozen=True):
    """All partitions of one index, by name, in the cluster file's order."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.names)

    def number_of(self, key: ChunkKey) -> int:
        """Which one the key belongs to."""
        return owners_of_slots(self.names)[key[0] << 4 | key[1] >> 4]

    def numbers_of(self, keys: Iterable[ChunkKey]) -> list[int]:
        """The same of many."""
        owners = owners_of_slots(self.names)
        return [owners[key[0] << 4 | key[1] >> 4] for key in keys]


class Part(msgspec.Struct, frozen=True):
    """One of them."""

    whole: Partitions
    number: int

    @property
    def name(self) -> str:
        """As the cluster file has it."""
        return self.whole.names[self.number]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.whole.names)

    def owns(self, key: ChunkKey) -> bool:
        """Whether the key belongs to it."""
        return self.whole.number_of(key) == self.number

    def slice_of(self, size_bytes: int) -> tuple[int, int]:
        """(start, length) of what this one may give out of a segment: those of all are disjoint, and aligned."""
        units = size_bytes // ALIGNMENT
        start, end = units * self.number // self.count, units * (self.number + 1) // self.count
        return start * ALIGNMENT, (end - start) * ALIGNMENT
