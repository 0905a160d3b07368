"""Says which entry goes next: a policy's order, without what is held and what is the prefix of another.

Pure. What the policy gives and may not go is set aside, and given back to it as the next to go when nothing keeps it
any more: so each entry is looked at once for each time that it was added, used, held or continued.
"""

from collections.abc import Callable, Iterable
from typing import Generic, Literal, get_args

from kvcore.eviction.adaptive import Arc, S3Fifo
from kvcore.eviction.base import EvictionPolicy, K
from kvcore.eviction.chains import Chains
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
    """Entries of one segment or slab. `chains` may be shared with others.

    `held` says of an entry whether it must stay; when that ends, its owner calls `refresh`. `leads` false: another
    evictor has all entries of this one, too, and tells `chains` what leaves.
    """

    def __init__(
        self, policy: EvictionPolicy[K], chains: Chains[K], held: Callable[[K], bool], *, leads: bool = True
    ) -> None:
        self._policy = policy
        self._chains = chains
        self._held = held
        self._leads = leads
        self._aside: dict[K, int] = {}
        """Taken from the policy, and kept for the time being -> its place."""
        self._next: tuple[K, int] | None = None
        """Taken from the policy, and nothing kept it when it was."""

    def __repr__(self) -> str:
        return f"<Evictor {self._policy}, {len(self._aside)} aside>"

    def add(self, key: K) -> None:
        """A new entry, of which `chains` was told. Of a prompt's the last one comes first."""
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

    def refresh(self, key: K) -> None:
        """It was used by the same user once more, or until now."""
        if self._next is not None:
            self._give_back_next()
        if key in self._aside:
            self._policy.put_back(key, self._aside.pop(key))
        self._policy.refresh(key)

    def remove(self, key: K) -> None:
        """It is gone, and not because room was needed."""
        self._return(key)
        self._policy.remove(key)
        if self._leads:
            self._chains.left(key)

    def victim(self) -> K | None:
        """The entry that goes next; None: none may."""
        taken = self._next or self._policy.take()
        while taken is not None:
            key, place = taken
            if self._held(key):
                self._aside[key] = place
            elif self._chains.is_prefix(key):
                self._aside[key] = place
                self._chains.wait(key, self._may_go)
            else:
                self._next = taken
                return key
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
        if self._leads:
            self._chains.left(key)
        return key

    def clear(self, keys: Iterable[K]) -> None:
        """All `keys`, which are all entries, are gone; it is used no more, and lets go of its owner."""
        for key in keys:
            self._chains.left(key)
        self._aside.clear()
        self._next, self._held = None, _never

    def _may_go(self, key: K) -> None:
        """It is no prefix any more, `chains` says."""
        if key in self._aside:
            self._return(key)

    def _return(self, key: K) -> None:
        """The policy has it again, as the next to go, if it was taken from it."""
        if self._next is not None:
            self._give_back_next()
        place = self._aside.pop(key, None)
        if place is not None:
            self._policy.put_back(key, place)

    def _give_back_next(self) -> None:
        if self._next is not None:
            self._policy.put_back(*self._next)
            self._next = None


def _never(_: object) -> bool:
    return False
