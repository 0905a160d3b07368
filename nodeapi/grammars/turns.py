"""Whose grammar is compiled next: the one's that was compiled for the shortest time, so that who sends slow ones waits
for them alone. Pure."""

from collections.abc import Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)


class CompileTurns(Generic[_T]):
    """What waits, by owners: each one's in the order in which they came. Several owners may wait for the same one.

    As in start-time fair queueing (`router.admission.fair_queue`) an owner's time goes on by what it is charged, and
    who comes anew begins at the time of the turn that was last: nobody saves up turns by waiting."""

    def __init__(self, least_s: float = 0.001) -> None:
        """`least_s`: what each turn costs."""
        self._least_s = least_s
        self._waiting: dict[Hashable, dict[_T, None]] = {}
        self._until: dict[Hashable, float] = {}
        self._now = 0.0

    def __repr__(self) -> str:
        return f"<CompileTurns {sum(map(len, self._waiting.values()))} wait, of {len(self._waiting)} owners>"

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, owner: Hashable, one: _T) -> None:
        """It waits from here on; nothing changes where it does."""
        self._until[owner] = max(self._until.get(owner, 0.0), self._now)
        self._waiting.setdefault(owner, {})[one] = None

    def remove(self, one: _T) -> None:
        """It waits no longer, for nobody."""
        for owner in [owner for owner, waiting in self._waiting.items() if waiting.pop(one, self) is None]:
            if not self._waiting[owner]:
                del self._waiting[owner]

    def take(self) -> tuple[Hashable, _T] | None:
        """What is next, and for whom; it waits no longer. None: nothing waits."""
        if not self._waiting:
            return None
        owner = min(self._waiting, key=self._until.__getitem__)
        self._now = self._until[owner]
        known = self._until.items()
        self._until = {one: until for one, until in known if until > self._now or one in self._waiting}
        one = next(iter(self._waiting[owner]))
        self.remove(one)
        return owner, one

    def charge(self, owner: Hashable, seconds: float) -> None:
        """What it took, once it has ended."""
        self._until[owner] = max(self._until.get(owner, 0.0), self._now) + max(seconds, self._least_s)

    def longest(self) -> tuple[Hashable, int]:
        """(who waits for the most, for how many). Somebody waits."""
        return max(((owner, len(waiting)) for owner, waiting in self._waiting.items()), key=lambda found: found[1])

    def count(self, owner: Hashable) -> int:
        """How many wait for it."""
        return len(self._waiting.get(owner, ()))

    def last_alone(self, owner: Hashable) -> _T | None:
        """The last of its own that nobody else waits for."""
        others = [waiting for other, waiting in self._waiting.items() if other != owner]
        own = reversed(self._waiting.get(owner, {}))
        return next((one for one in own if not any(one in waiting for waiting in others)), None)
