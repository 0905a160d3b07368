"""In which order the chunks of one tenant go from a slab: the slab's policy, over places in its table. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from kvcore.eviction.evictor import Evictor, PolicyName, new_policy
from kvstore.tiers.base import ChunkName


class SlabOrder:
    """See `VictimOrder`: of one tenant's chunks, by their places in the table. `names`: of all that lie there."""

    def __init__(
        self, eviction: PolicyName, stays: Callable[[ChunkName], bool], names: Mapping[int, ChunkName]
    ) -> None:
        self._evictor: Evictor[ChunkName] = Evictor(new_policy(eviction), stays)
        self._names, self._numbers = names, dict[ChunkName, int]()

    def __repr__(self) -> str:
        return repr(self._evictor)

    def add(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        for row in rows:
            self._numbers[self._names[row]] = row
            self._evictor.add(self._names[row])

    def use(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        for row in rows:
            self._evictor.use(self._names[row])

    def refresh(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        for row in rows:
            self._evictor.refresh(self._names[row])

    def remove(self, row: int) -> None:
        """See `VictimOrder`."""
        del self._numbers[self._names[row]]
        self._evictor.remove(self._names[row])

    def let_go(self, row: int) -> None:
        """See `VictimOrder`."""
        self._evictor.let_go(self._names[row])

    def victim(self) -> int | None:
        """See `VictimOrder`."""
        name = self._evictor.victim()
        return None if name is None else self._numbers[name]

    def evict(self) -> int | None:
        """See `VictimOrder`."""
        name = self._evictor.evict()
        return None if name is None else self._numbers.pop(name)

    def rows(self) -> Iterable[int]:
        """See `VictimOrder`."""
        return self._numbers.values()

    def clear(self) -> None:
        """See `VictimOrder`."""
        self._evictor.clear()
