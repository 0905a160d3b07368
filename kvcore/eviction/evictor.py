"""Says which entry goes next: a policy's order, without what is kept for the time being.

Pure. What the policy gives and may not go is set aside, and given back to it as the next to go when nothing keeps it
any more: so each entry is looked at once for each time that it was added, used or kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Literal, get_args

from kvcore.eviction.adaptive import Arc, S3Fifo
from kvcore.eviction.base import EvictionPolicy, K
from kvcore.eviction.queues import Fifo, Lfu, Lru

PolicyName = Literal["lru", "lfu", "fifo", "arc", "s3fifo"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)


def new_policy(name: PolicyName) -> EvictionPolicy[K]:
    """The policy of that name, without entries."""
    policies: dict[PolicyName, Callable[[], EvictionPolicy[K]]] = {
        "lru": Lru,
        "lfu": Lfu,
        "fifo": Fifo,
        "arc": Arc,
        "s3fifo": S3Fifo,
    }
    return policies[name]()


class Evictor(Generic[K]):
    """Entries of one segment or slab.

    `kept` says of an entry whether it must stay, as it is read or continued. When a reader leaves, the entry's owner
    calls `refresh`; when it is the prefix of nothing any more, `let_go`.
    """

    def __init__(self, policy: EvictionPolicy[K], kept: Callable[[K], bool]) -> None:
        self._policy = policy
        self._kept = kept
        self._aside: dict[K, int] = {}
        """Taken from the policy, and kept for the time being -> its place."""
        self._next: tuple[K, int] | None = None
        """Taken from the policy, and nothing kept it when it was."""

    def __repr__(self) -> str:
        return f"<Evictor {self._policy}, {len(self._aside)} aside>"

    def taken(self) -> Iterator[K]:
        """Entries that are there, and that the policy does not have now."""
        yield from self._aside
        if self._next is not None:
            yield self._next[0]

    def add(self, key: K) -> None:
        """A new entry. Of a prompt's the last one comes first."""
        if self._next is not None:
            self._give_back_next()
        self._policy.add(key)

    def use(self, key: K) -> None:
        """It was used. Of a prefix those who use it all tell the last one first: the first shall go last."""
        if self._next is not None:
            self._give_back_next()
        if key in self._aside:
            self._policy.put_back(key, self._aside.pop(key))
        self._policy.use(key)

    def give_back(self, keys: Sequence[K]) -> None:
        """The policy has all of these, as they are about to be used."""
        if self._next is not None:
            self._give_back_next()
        if self._aside:
            for key in keys:
                place = self._aside.pop(key, None)
                if place is not None:
                    self._policy.put_back(key, place)

    def refresh(self, key: K) -> None:
        """It was used by the same user once more, or until now."""
        if self._next is not None:
            self._give_back_next()
        if key in self._aside:
            self._policy.put_back(key, self._aside.pop(key))
        self._policy.refresh(key)

    def remove(self, key: K) -> None:
        """It is gone, and not because room was needed."""
        self.let_go(key)
        self._policy.remove(key)

    def let_go(self, key: K) -> None:
        """Nothing keeps it any more: the policy has it again, as the next to go, if it was taken from it."""
        if self._next is not None:
            self._give_back_next()
        place = self._aside.pop(key, None)
        if place is not None:
            self._policy.put_back(key, place)

    def victim(self) -> K | None:
        """The entry that goes next; None: none may."""
        taken = self._next or self._policy.take()
        while taken is not None:
            key, place = taken
            if not self._kept(key):
                self._next = taken
                return key
            self._aside[key] = place
            taken = self._policy.take()
        self._next = None
        return None

    def evict(self) -> K | None:
        """As `victim`; it is gone."""
        if self.victim() is None:
            return None
        assert self._next is not None
        key, place = self._next
        self._next = None
        self._policy.evicted(key, place)
        return key

    def clear(self) -> None:
        """It is used no more, and lets go of its owner."""
        self._aside.clear()
        self._next, self._kept = None, _never

    def _give_back_next(self) -> None:
        if self._next is not None:
            self._policy.put_back(*self._next)
            self._next = None


def _never(_: object) -> bool:
    return False
