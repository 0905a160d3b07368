"""Local memory that NIXL was told of: regions for good, buffers of batches for as long as they are under way.

NIXL finds no registration for a range that lies in two of them or across two, so they never overlap: a buffer inside of
a registered range uses that one; one that only overlaps is refused, and its caller copies.
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
class Claim:
    """One registered range `[start, end)` and how many use it; one that is `lasting` stays without users."""

    start: int
    end: int
    registered: Any
    lasting: bool
    users: int = 0


class Registrations:
    """Disjoint registered ranges of one agent."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        self._claims: list[Claim] = []

    def __len__(self) -> int:
        return len(self._claims)

    def add(self, address: int, size: int) -> None:
        """Register a region for good. Raises ConfigError, also if part of it is in use by a batch or a region."""
        claim = self._covering(address, size)
        if claim is None:
            claim = self._register(address, size)
        if claim is None:
            raise ConfigError(f"a region of {size} bytes overlaps memory that is registered already")
        claim.lasting = True

    def take(self, address: int, size: int) -> Claim | None:
        """Have a range registered until `give`; None if it overlaps one that does not hold all of it."""
        claim = self._covering(address, size) or self._register(address, size)
        if claim is not None:
            claim.users += 1
        return claim

    def give(self, claim: Claim) -> None:
        """The end of one `take`."""
        claim.users -= 1
        if claim.users == 0 and not claim.lasting:
            del self._claims[self._after(claim.start) - 1]
            self._registrar.deregister(claim.registered)

    def _after(self, address: int) -> int:
        """Index of the first range that starts behind `address`."""
        return bisect.bisect_right(self._claims, address, key=_start)

    def _covering(self, address: int, size: int) -> Claim | None:
        index = self._after(address)
        before = self._claims[index - 1] if index else None
        return before if before is not None and before.end >= address + size else None

    def _register(self, address: int, size: int) -> Claim | None:
        index = self._after(address)
        if index and self._claims[index - 1].end > address:
            return None
        if index < len(self._claims) and self._claims[index].start < address + size:
            return None
        claim = Claim(address, address + size, self._registrar.register([(address, size)]), lasting=False)
        self._claims.insert(index, claim)
        return claim


def _start(claim: Claim) -> int:
    return claim.start
