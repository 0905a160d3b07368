"""Time in the metadata state: deadlines that can be moved or dropped, and read leases.

Both are pure: `now` is passed in. Invariant: `Deadlines.next` is exact, dropped deadlines never fire.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from kvcore.types import ChunkKey, OwnerTag
from metadata_server.index.chunks.replicas import ReplicaIndex


class Expiry(IntEnum):
    """What runs out."""

    NODE = 0
    RESERVATION = 1
    RETIRED = 2
    READ_LEASE = 3
    PIN = 4
    CHUNK = 5


ExpiryOf = int | str | ChunkKey
"""A lease's id, a grant's number, a row, a node's id, or a chunk's key."""
ExpiryKey = tuple[Expiry, ExpiryOf]


class Deadlines:
    """At most one deadline a key."""

    def __init__(self) -> None:
        self._at: dict[ExpiryKey, float] = {}
        self._heap: list[tuple[float, int, ExpiryKey]] = []
        self._count = 0

    def __repr__(self) -> str:
        return f"<Deadlines {len(self._at)}, next {self.next}>"

    def set(self, key: ExpiryKey, at: float) -> None:
        """Set or move."""
        self._at[key] = at
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, key))
        if len(self._heap) > 64 + 2 * len(self._at):  # most are moved or dropped ones: a busy server would pile them up
            self._heap = [entry for entry in self._heap if self._at.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)

    def drop(self, key: ExpiryKey) -> None:
        """Forget; unknown is fine."""
        self._at.pop(key, None)

    def at(self, key: ExpiryKey) -> float | None:
        """When it runs out; None: it has no deadline."""
        return self._at.get(key)

    def __contains__(self, key: ExpiryKey) -> bool:
        return key in self._at

    @property
    def next(self) -> float | None:
        """The earliest."""
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> Iterator[ExpiryKey]:
        """Take out what is due at `now`, earliest first; what is set meanwhile and due comes too."""
        while (at := self.next) is not None and at <= now:
            key = heapq.heappop(self._heap)[2]
            del self._at[key]
            yield key


@dataclass(frozen=True, slots=True)
class ReadLease:
    """Pins replicas; `holder` is a live node's id or None. `name`: what its reader calls it; 0: nothing. `reader`:
    which node, and which start of it, its reader says it is of, registered or not; empty: of none. `owner`: whose
    prompt is read, if that is known."""

    rows: tuple[int, ...]
    holder: str | None
    name: int
    reader: tuple[str, int] = ("", 0)
    began: float = 0.0
    owner: OwnerTag | None = None


class ReadLeases:
    """Who may read what undisturbed. Pins and unpins replicas; deadlines are its caller's. Ids are above `last_id`.

    A reader may name a lease before it is granted, and give it back by that name without having seen the reply: also
    before the request arrives, which then gets none.
    """

    def __init__(self, index: ReplicaIndex, last_id: int = 0, *, step: int = 1, max_given_back: int = 16_384) -> None:
        """`step`: between ids. Of names that were given back before a lease had them the last `max_given_back` are
        remembered."""
        self._index = index
        self._leases: dict[int, ReadLease] = {}
        self._by_holder: dict[str, set[int]] = {}
        self._by_name: dict[int, int] = {}
        self._by_owner: Counter[tuple[str, OwnerTag]] = Counter()
        """Of each tenant, at each node and (by the empty name) in all."""
        self._given_back: dict[int, None] = {}
        self._max_given_back = max_given_back
        self._last_id, self._step = last_id, step
        self.num_nobodys = 0
        """Leases without a holder."""
        self.nobodys_bytes = 0
        """Pinned by leases without a holder; what several of them pin counts as often."""

    def __len__(self) -> int:
        return len(self._leases)

    def __repr__(self) -> str:
        return f"<ReadLeases {len(self._leases)} held, by {len(self._by_holder)} nodes>"

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._leases

    def items(self) -> Iterable[tuple[int, ReadLease]]:
        """Each with its id, the oldest first."""
        return self._leases.items()

    def wanted(self, name: int) -> bool:
        """Whether a lease of this name may be granted: it was not given back already."""
        return name not in self._given_back

    def grant(
        self,
        rows: Iterable[int],
        holder: str | None,
        name: int = 0,
        *,
        reader: tuple[str, int] = ("", 0),
        began: float = 0.0,
        owner: OwnerTag | None = None,
    ) -> int:
        """Pin replicas, each of them complete; returns the lease's id, > 0."""
        lease = ReadLease(tuple(rows), holder, name, reader, began, owner)
        self._index.pin(lease.rows)
        self._last_id += self._step
        self._leases[self._last_id] = lease
        if name:
            self._by_name[name] = self._last_id
        for where in _counted(lease):
            self._by_owner[where] += 1
        if holder is not None:
            self._by_holder.setdefault(holder, set()).add(self._last_id)
        else:
            self.num_nobodys += 1
            self.nobodys_bytes += self._index.bytes_of(lease.rows)
        return self._last_id

    def end(self, lease_id: int) -> bool:
        """Unpin, last chunk first, so that of one prefix the tail is evicted first. False: unknown."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        if self._by_name.get(lease.name) == lease_id:
            del self._by_name[lease.name]
        for where in _counted(lease):
            self._by_owner[where] -= 1
            if not self._by_owner[where]:
                del self._by_owner[where]
        if lease.holder is not None:
            held = self._by_holder[lease.holder]
            held.discard(lease_id)
            if not held:
                del self._by_holder[lease.holder]
        else:
            self.num_nobodys -= 1
            self.nobodys_bytes -= self._index.bytes_of(lease.rows)
        self._index.unpin(lease.rows[::-1])
        return True

    def give_back(self, name: int) -> int | None:
        """The id of the lease of this name, which is to be ended. None: there is none, and will be none."""
        lease_id = self._by_name.get(name)
        if lease_id is None:
            self._given_back[name] = None
            if len(self._given_back) > self._max_given_back:
                del self._given_back[next(iter(self._given_back))]
        return lease_id

    def is_held(self, lease_id: int, holder: str) -> bool:
        """Whether this node holds it."""
        return lease_id in self._by_holder.get(holder, ())

    def num_of(self, holder: str) -> int:
        """How many leases this node has."""
        return len(self._by_holder.get(holder, ()))

    def num_of_owner(self, owner: OwnerTag, holder: str = "") -> int:
        """How many leases this tenant's prompts have; `holder`: at that node."""
        return self._by_owner[holder, owner]

    def of_holder(self, holder: str) -> list[int]:
        """Ids of the leases of one node."""
        return sorted(self._by_holder.get(holder, ()))

    def holders(self) -> set[str]:
        """Every node that holds one."""
        return set(self._by_holder)

    def pins(self) -> dict[int, int]:
        """Row -> number of leases on it, for checks."""
        counts: dict[int, int] = {}
        for lease in self._leases.values():
            for row in lease.rows:
                counts[row] = counts.get(row, 0) + 1
        return counts

    def check(self) -> None:
        """Assert that the counts are right. For tests."""
        assert self._by_owner == Counter(where for lease in self._leases.values() for where in _counted(lease))


def _counted(lease: ReadLease) -> list[tuple[str, OwnerTag]]:
    if lease.owner is None:
        return []
    return [("", lease.owner), (lease.holder, lease.owner)] if lease.holder else [("", lease.owner)]
