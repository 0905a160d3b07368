"""In which order the replicas of one segment are evicted: the policies of `kvcore.eviction` over rows of the table.

Those that keep one order keep it in the table's columns; the others remember keys of what went, so they are told keys.
"""

from collections.abc import Iterable, Sequence

from kvcore.eviction.base import EvictionPolicy
from kvcore.eviction.evictor import Evictor, PolicyName, new_policy
from kvcore.eviction.quotas import VictimOrder
from kvcore.eviction.rows import RowFifo, RowLru
from kvcore.types import ChunkKey
from metadata_server.index.chunks.calls import CallCount
from metadata_server.index.chunks.rows import ReplicaTable


class RowOrder:
    """LRU and FIFO."""

    def __init__(self, policy: RowLru, table: ReplicaTable) -> None:
        self._policy = policy
        self._evictor = Evictor[int](policy, table.kept)

    def __repr__(self) -> str:
        return repr(self._evictor)

    def add(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        self._evictor.give_back(())
        self._policy.add_all(rows)

    def use(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        self._evictor.give_back(rows)
        self._policy.use_all(rows)

    def refresh(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        self.use(rows)

    def remove(self, row: int) -> None:
        """See `VictimOrder`."""
        self._evictor.remove(row)

    def let_go(self, row: int) -> None:
        """See `VictimOrder`."""
        self._evictor.let_go(row)

    def victim(self) -> int | None:
        """See `VictimOrder`."""
        return self._evictor.victim()

    def evict(self) -> int | None:
        """See `VictimOrder`."""
        return self._evictor.evict()

    def rows(self) -> Iterable[int]:
        """See `VictimOrder`."""
        yield from self._policy
        yield from self._evictor.taken()

    def clear(self) -> None:
        """See `VictimOrder`."""
        self._evictor.clear()


class KeyOrder:
    """Any policy: it costs a few hundred bytes more a replica."""

    def __init__(self, policy: EvictionPolicy[ChunkKey], table: ReplicaTable, calls: CallCount) -> None:
        self._table, self._calls = table, calls
        self._rows: dict[ChunkKey, int] = {}
        self._counted_at: dict[ChunkKey, float] = {}
        """When a use was last counted as one."""
        self._evictor = Evictor[ChunkKey](policy, lambda key: table.kept(self._rows[key]))

    def __repr__(self) -> str:
        return repr(self._evictor)

    def add(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        for row in rows:
            key = self._table.keys[row]
            self._rows[key], self._counted_at[key] = row, self._calls.now
            self._evictor.add(key)

    def use(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        now, same_use_s = self._calls.now, self._calls.same_use_s
        for key in map(self._table.keys.__getitem__, rows):
            if now - self._counted_at[key] >= same_use_s:
                self._counted_at[key] = now
                self._evictor.use(key)
            else:
                self._evictor.refresh(key)

    def refresh(self, rows: Sequence[int]) -> None:
        """See `VictimOrder`."""
        for row in rows:
            self._evictor.refresh(self._table.keys[row])

    def remove(self, row: int) -> None:
        """See `VictimOrder`."""
        key = self._table.keys[row]
        self._evictor.remove(key)
        del self._rows[key], self._counted_at[key]

    def let_go(self, row: int) -> None:
        """See `VictimOrder`."""
        self._evictor.let_go(self._table.keys[row])

    def victim(self) -> int | None:
        """See `VictimOrder`."""
        key = self._evictor.victim()
        return None if key is None else self._rows[key]

    def evict(self) -> int | None:
        """See `VictimOrder`."""
        key = self._evictor.evict()
        if key is None:
            return None
        del self._counted_at[key]
        return self._rows.pop(key)

    def rows(self) -> Iterable[int]:
        """See `VictimOrder`."""
        return self._rows.values()

    def clear(self) -> None:
        """See `VictimOrder`."""
        self._evictor.clear()


def new_key_order(name: PolicyName, table: ReplicaTable, calls: CallCount) -> VictimOrder:
    """One of several orders over the same replicas: it needs no column."""
    return KeyOrder(new_policy(name), table, calls)


def new_order(name: PolicyName, table: ReplicaTable, calls: CallCount) -> VictimOrder:
    """The order of that policy, without replicas."""
    if name == "lru":
        return RowOrder(RowLru(table.older, table.newer), table)
    if name == "fifo":
        return RowOrder(RowFifo(table.older, table.newer), table)
    return KeyOrder(new_policy(name), table, calls)
