"""Memory in which a store encrypts chunks before they are moved, slot by slot, each for one group of chunks at a time.

Owns the memory, and who has which slot. Nobody waits for one: a segment that hangs must not hold up writes to another.
Who needs more than there are gets memory for that one use, so what writers may do at once bounds it.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

_Item = TypeVar("_Item")


class Scratch:
    """`num_slots` of `slot_bytes` each are kept; their pages are there from their first use on. Used on one thread."""

    def __init__(self, slot_bytes: int, num_slots: int) -> None:
        self.slot_bytes, self.num_slots = slot_bytes, num_slots
        self.memory = memoryview(mmap.mmap(-1, slot_bytes * num_slots))
        """All that is kept, for transports that want to know local memory before its first use."""
        self._free = [self.memory[at * slot_bytes : (at + 1) * slot_bytes] for at in range(num_slots)]

    def __repr__(self) -> str:
        return f"<Scratch {len(self._free)} slots of {self.slot_bytes} bytes free>"

    @contextmanager
    def slot(self) -> Iterator[memoryview]:
        """One that nobody else has until this is left, by when nothing may use it any more."""
        if not self._free:
            yield memoryview(mmap.mmap(-1, self.slot_bytes))
            return
        slot = self._free.pop()
        try:
            yield slot
        finally:
            self._free.append(slot)

    def groups(self, items: Sequence[_Item], sizes: Sequence[int]) -> list[list[_Item]]:
        """The items in order, in groups that fit into a slot. No item is larger than one."""
        groups: list[list[_Item]] = []
        room = 0
        for item, size in zip(items, sizes, strict=True):
            assert size <= self.slot_bytes, "a slot has room for every chunk"
            if not groups or size > room:
                groups.append([])
                room = self.slot_bytes
            groups[-1].append(item)
            room -= size
        return groups
