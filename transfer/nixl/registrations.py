"""Local memory that is registered with NIXL: regions for good, buffers of batches for as long as they are under way.

NIXL finds no registration for a range that lies in two of them or across two, so they never overlap. Three cases: a
buffer inside of a registered range uses that one; a buffer that only overlaps one is refused, and its caller copies;
any other is registered.
"""

import bisect
from dataclasses import dataclass
from typing import Any, Protocol

from kvcore.errors import ConfigError


class Registrar(Protocol):
    """What registers memory: an agent."""

    def register(self, ranges: list[tuple[int, int]]) -> Any:
        """See NixlAgent."""
        ...

    def deregister(self, registered: Any) -> None:
        """See NixlAgent."""
        ...


@dataclass(eq=False, slots=True)
class RegisteredRange:
    """`[start, end)` and how many batches use it; one that is `permanent` stays without users."""

    start: int
    end: int
    registered: Any
    permanent: bool
    users: int = 0


class Registrations:
    """Disjoint registered ranges of one agent."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        self._ranges: list[RegisteredRange] = []

    def __len__(self) -> int:
        return len(self._ranges)

    def add(self, address: int, size: int) -> None:
        """Register a region for good. Raises ConfigError, also if part of it is in use by a batch or a region."""
        found = self._covering(address, size)
        if found is None:
            found = self._register(address, size)
        if found is None:
            raise ConfigError(f"a region of {size} bytes overlaps memory that is registered already")
        found.permanent = True

    def acquire(self, address: int, size: int) -> RegisteredRange | None:
        """Have a range registered until `release`; None if it overlaps one that does not hold all of it."""
        found = self._covering(address, size) or self._register(address, size)
        if found is not None:
            found.users += 1
        return found

    def release(self, found: RegisteredRange) -> None:
        """The end of one `acquire`."""
        found.users -= 1
        if found.users == 0 and not found.permanent:
            del self._ranges[self._after(found.start) - 1]
            self._registrar.deregister(found.registered)

    def _after(self, address: int) -> int:
        """Index of the first range that starts behind `address`."""
        return bisect.bisect_right(self._ranges, address, key=_start)

    def _covering(self, address: int, size: int) -> RegisteredRange | None:
        index = self._after(address)
        before = self._ranges[index - 1] if index else None
        return before if before is not None and before.end >= address + size else None

    def _register(self, address: int, size: int) -> RegisteredRange | None:
        index = self._after(address)
        if index and self._ranges[index - 1].end > address:
            return None
        if index < len(self._ranges) and self._ranges[index].start < address + size:
            return None
        found = RegisteredRange(address, address + size, self._registrar.register([(address, size)]), permanent=False)
        self._ranges.insert(index, found)
        return found


def _start(found: RegisteredRange) -> int:
    return found.start
