"""One segment's replicas: where they lie, how much they take, which one goes first.

Owns placement inside of the segment, accounting and LRU order; not the index of keys. Invariants: each replica holds
exactly one extent; `lru` has the complete ones without a pin, oldest first; the counts are sums over replicas.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from kvcore.extents import ALIGNMENT, ExtentAllocator, aligned
from kvcore.types import ReplicaRef, Segment
from metadata_server.messages import ManifestEntry, SegmentStats


class ReplicaState(StrEnum):
    """The life of one replica:

    | from | to | when |
    |---|---|---|
    | new | reserved | room is given to a writer |
    | new | complete | found by its header, in a manifest |
    | reserved | complete | commit |
    | reserved | retiring | abort; its time is up; its writer died |
    | reserved | gone | its segment was dropped |
    | retiring | gone | the grace time is over; its segment was dropped |
    | complete | gone | evicted; quarantined; its segment was dropped |
    """

    RESERVED = "reserved"
    COMPLETE = "complete"
    RETIRING = "retiring"
    """Its writer may still be writing: nobody else may use the room yet."""


TRANSITIONS: dict[ReplicaState | None, frozenset[ReplicaState | None]] = {
    None: frozenset({ReplicaState.RESERVED, ReplicaState.COMPLETE}),
    ReplicaState.RESERVED: frozenset({ReplicaState.COMPLETE, ReplicaState.RETIRING, None}),
    ReplicaState.RETIRING: frozenset({None}),
    ReplicaState.COMPLETE: frozenset({None}),
}
"""State -> the states that may follow; None: not there yet, or no longer."""


@dataclass(frozen=True, slots=True)
class Writer:
    """The node process that reserved a replica."""

    node_id: str
    incarnation: int


class Replica(msgspec.Struct, eq=False, gc=False):
    """One extent and what is in it. `writer` None: found by its header.

    The collector does not see it, as there may be millions: whoever drops a segment empties `SegmentRecord.replicas`.
    """

    ref: ReplicaRef
    record: "SegmentRecord"
    state: ReplicaState
    writer: Writer | None
    pins: int = 0
    room_bytes: int = 0
    """Of its extent; set by `SegmentRecord.add`."""

    def __repr__(self) -> str:
        ref = self.ref
        return f"<Replica {ref.id} of {ref.key.hex()} {self.state.value} in {ref.segment_id}, {self.pins} pins>"


@dataclass(slots=True)
class CallCount:
    """Calls of the state so far: the time in which segments tell how long a replica was not used."""

    so_far: int = 0


class SegmentRecord:
    """A live node's segment."""

    def __init__(self, segment: Segment, taken: list[ManifestEntry], calls: CallCount) -> None:
        """`taken` as `acceptable` gave them; each is then to be added by `add`. `calls`: the same for all segments."""
        self.segment = segment
        self.allocator = ExtentAllocator(segment.size_bytes, [(entry.offset, entry.length) for entry in taken])
        self.replicas: dict[int, Replica] = {}
        self.lru: OrderedDict[int, int] = OrderedDict()
        """Id -> the call of its last use. A plain dict takes 25 us to find its first entry when many are gone."""
        self._calls = calls
        self.bytes_in = dict.fromkeys(ReplicaState, 0)
        self.num_complete = 0

    def __repr__(self) -> str:
        use = f"{self.allocator.used} of {self.allocator.capacity} bytes"
        return f"<SegmentRecord {self.segment.id}: {use}, {len(self.replicas)} replicas, {len(self.lru)} evictable>"

    @property
    def idle_calls(self) -> int:
        """Calls since the last use of the replica that is evicted next; -1: none can be."""
        last_use = next(iter(self.lru.values()), None)
        return -1 if last_use is None else self._calls.so_far - last_use

    def allocate(self, length: int, high: float) -> int | None:
        """Room that needs no eviction: the use stays at or under the share `high`, or this is all. Offset or None."""
        used = self.allocator.used
        if used and used + aligned(length) > high * self.allocator.capacity:
            return None
        return self.allocator.allocate(length)

    def allocate_evicting(
        self, length: int, high: float, low: float, *, old_calls: float = 0.0
    ) -> tuple[int | None, list[Replica]]:
        """Room, after eviction if the use would pass the share `high`; with what was evicted.

        Goes on down to the share `low` with what was not used for `old_calls`. Also evicts against fragmentation, but
        no more bytes than that than twice what is asked.
        """
        size, space = aligned(length), self.allocator
        if size > space.capacity:
            return None, []
        evicted: list[Replica] = []
        if space.used + size > high * space.capacity:
            while self.lru and space.used + size > low * space.capacity:
                if space.used + size <= high * space.capacity and self.idle_calls < old_calls:
                    break
                evicted.append(self._evict_oldest())
        spent = 0
        while self.lru and space.largest_free < size and spent < 2 * size:
            evicted.append(self._evict_oldest())
            spent += evicted[-1].room_bytes
        return space.allocate(length), evicted

    def add(self, replica: Replica) -> None:
        """Add a replica whose extent is allocated already."""
        assert replica.state in TRANSITIONS[None]
        self.replicas[replica.ref.id] = replica
        replica.room_bytes = aligned(replica.ref.length)
        self.bytes_in[replica.state] += replica.room_bytes
        if replica.state is ReplicaState.COMPLETE:
            self._completed(replica)

    def set_state(self, replica: Replica, state: ReplicaState) -> None:
        """Move a reserved replica on."""
        assert state in TRANSITIONS[replica.state], f"{replica} cannot become {state}"
        self.bytes_in[replica.state] -= replica.room_bytes
        self.bytes_in[state] += replica.room_bytes
        replica.state = state
        if state is ReplicaState.COMPLETE:
            self._completed(replica)

    def remove(self, replica: Replica) -> None:
        """Forget a replica and free its room. Leases on it stay valid to end, and protect nothing."""
        del self.replicas[replica.ref.id]
        self.lru.pop(replica.ref.id, None)
        self.bytes_in[replica.state] -= replica.room_bytes
        self.num_complete -= replica.state is ReplicaState.COMPLETE
        self.allocator.release(replica.ref.offset)

    def clear(self) -> None:
        """Forget all: the segment is no longer a live node's. Leases on its replicas stay valid to end."""
        self.replicas = {}
        self.lru.clear()

    def touch(self, replica: Replica) -> None:
        """Make a complete replica the last to go."""
        if replica.pins == 0:
            self._used(replica)

    def pin(self, replica: Replica) -> None:
        """Keep a complete replica from eviction."""
        replica.pins += 1
        self.lru.pop(replica.ref.id, None)

    def unpin(self, replica: Replica) -> None:
        """Undo one `pin`; with the last one it may be evicted again, as the last to go."""
        replica.pins -= 1
        if replica.pins == 0 and self.replicas.get(replica.ref.id) is replica:
            self._used(replica)

    def complete_replicas(self) -> list[Replica]:
        """The complete replicas."""
        return [replica for replica in self.replicas.values() if replica.state is ReplicaState.COMPLETE]

    def stats(self) -> SegmentStats:
        """Use of the segment."""
        return SegmentStats(
            segment=self.segment,
            used_bytes=self.allocator.used,
            reserved_bytes=self.bytes_in[ReplicaState.RESERVED],
            retiring_bytes=self.bytes_in[ReplicaState.RETIRING],
            num_replicas=self.num_complete,
        )

    def check(self) -> None:
        """Assert every invariant. For tests."""
        self.allocator.check()
        for state, total in self.bytes_in.items():
            assert total == sum(aligned(r.ref.length) for r in self.replicas.values() if r.state is state)
        assert self.allocator.used == sum(self.bytes_in.values())
        assert self.num_complete == len(self.complete_replicas())
        for replica in self.replicas.values():
            evictable = replica.state is ReplicaState.COMPLETE and replica.pins == 0
            assert evictable == (replica.ref.id in self.lru)
        assert set(self.lru) <= set(self.replicas)
        assert list(self.lru.values()) == sorted(self.lru.values()), "used in another order"

    def _completed(self, replica: Replica) -> None:
        self._used(replica)
        self.num_complete += 1

    def _used(self, replica: Replica) -> None:
        self.lru[replica.ref.id] = self._calls.so_far
        self.lru.move_to_end(replica.ref.id)

    def _evict_oldest(self) -> Replica:
        replica = self.replicas[next(iter(self.lru))]
        self.remove(replica)
        return replica


def acceptable(segment: Segment, entries: list[ManifestEntry]) -> list[ManifestEntry]:
    """Entries that may be adopted, newest generation first: inside, aligned, disjoint, one a key."""
    capacity = segment.size_bytes // ALIGNMENT * ALIGNMENT
    taken = bytearray(capacity // ALIGNMENT)  # a byte a unit: overlap is one memchr
    keys: set[bytes] = set()
    accepted: list[ManifestEntry] = []
    for entry in sorted(entries, key=lambda e: (-e.generation, e.offset)):
        end = entry.offset + aligned(entry.length)
        if entry.offset % ALIGNMENT or end > capacity or entry.key in keys:
            continue
        first, last = entry.offset // ALIGNMENT, end // ALIGNMENT
        if taken.find(1, first, last) >= 0:
            continue
        taken[first:last] = b"\x01" * (last - first)
        keys.add(entry.key)
        accepted.append(entry)
    return accepted
