"""What an eviction policy is: an order in which entries go, changed by their uses. It knows no pins and no chains.

Every call is O(1) amortized. `tests/property/test_eviction.py` holds each policy to its definition.
"""

from collections.abc import Hashable
from typing import Protocol, TypeVar

K = TypeVar("K", bound=Hashable)


class EvictionPolicy(Protocol[K]):
    """An order over entries that are there. `Evictor` is its only user, and keeps to the order of calls below."""

    def add(self, key: K) -> None:
        """A new entry; it may have been there before."""
        ...

    def use(self, key: K) -> None:
        """The entry was used."""
        ...

    def refresh(self, key: K) -> None:
        """It was used by the same user once more: that is recent, but no second use."""
        ...

    def remove(self, key: K) -> None:
        """It is gone, and not because room was needed."""
        ...

    def take(self) -> tuple[K, int] | None:
        """Take out the entry that goes next, with its place: what the next two calls need. None: there is none."""
        ...

    def put_back(self, key: K, place: int) -> None:
        """What was taken is to stay after all: it is the next to go of its place again."""
        ...

    def evicted(self, key: K, place: int) -> None:
        """What was taken has gone."""
        ...
