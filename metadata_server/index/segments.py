"""One segment's replicas: where they lie, how much they take, which one goes first.

Owns placement inside of the segment, accounting and the order of eviction; not the index of keys. Invariants: each
replica holds exactly one extent; the evictor has the complete ones, and no victim has a pin; the counts are sums.
"""

from dataclasses import dataclass
from enum import StrEnum

import msgspec

from kvcore.eviction.base import EvictionPolicy
from kvcore.eviction.chains import Chains
from kvcore.eviction.evictor import Evictor
from kvcore.extents import ALIGNMENT, ExtentAllocator, aligned
from kvcore.types import ChunkKey, ReplicaRef, Segment
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

    The collector does not see it, as there may be millions: whoever drops a segment clears its record.
    """

    ref: ReplicaRef
    record: "SegmentRecord"
    state: ReplicaState
    writer: Writer | None
    parent: ChunkKey | None = None
    """What it continues, as far as its writer said."""
    pins: int = 0
    room_bytes: int = 0
    """Of its extent; set by `SegmentRecord.add`."""
    last_use: int = 0
    """The call of it."""
    counted_at: float = 0.0
    """When a use was last counted as one."""

    def __repr__(self) -> str:
        ref = self.ref
        return f"<Replica {ref.id} of {ref.key.hex()} {self.state.value} in {ref.segment_id}, {self.pins} pins>"


@dataclass(slots=True)
class CallCount:
    """Calls of the state so far: the time in which segments tell how long a replica was not used."""

    so_far: int = 0
    now: float = 0.0
    """Of the last call."""
    same_use_s: float = 0.0
    """Uses so soon after one that was counted are the same use: who stores a chunk hands it over to who reads it."""


class SegmentRecord:
    """A live node's segment."""

    def __init__(
        self,
        segment: Segment,
        taken: list[ManifestEntry],
        calls: CallCount,
        *,
        policy: EvictionPolicy[ChunkKey],
        chains: Chains[ChunkKey],
    ) -> None:
        """`taken` as `acceptable` gave them; each is then to be added by `add`. `calls`: the same for all segments.
        `chains` is told of a complete replica before it is added."""
        self.segment = segment
        self.allocator = ExtentAllocator(segment.size_bytes, [(entry.offset, entry.length) for entry in taken])
        self.complete: dict[ChunkKey, Replica] = {}
        self._incomplete: dict[int, Replica] = {}
        """Reserved and retiring ones, by id."""
        self.chains = chains
        """What continues what in this segment."""
        self._evictor = Evictor(policy, chains, self._is_pinned)
        self._calls = calls
        self.bytes_in = dict.fromkeys(ReplicaState, 0)

    def __repr__(self) -> str:
        use = f"{self.allocator.used} of {self.allocator.capacity} bytes"
        count = len(self.complete) + len(self._incomplete)
        return f"<SegmentRecord {self.segment.id}: {use}, {count} replicas, {self._evictor}>"

    @property
    def idle_calls(self) -> int:
        """Calls since the last use of the replica that is evicted next; -1: none can be."""
        victim = self._evictor.victim()
        return -1 if victim is None else self._calls.so_far - self.complete[victim].last_use

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
            while space.used + size > low * space.capacity:
                if space.used + size <= high * space.capacity and self.idle_calls < old_calls:
                    break
                if not self._evict_next(evicted):
                    break
        spent = 0
        while space.largest_free < size and spent < 2 * size and self._evict_next(evicted):
            spent += evicted[-1].room_bytes
        return space.allocate(length), evicted

    def add(self, replica: Replica) -> None:
        """Add a replica whose extent is allocated already."""
        assert replica.state in TRANSITIONS[None]
        replica.room_bytes = aligned(replica.ref.length)
        self.bytes_in[replica.state] += replica.room_bytes
        if replica.state is ReplicaState.COMPLETE:
            self._completed(replica)
        else:
            self._incomplete[replica.ref.id] = replica

    def set_state(self, replica: Replica, state: ReplicaState) -> None:
        """Move a reserved replica on."""
        assert state in TRANSITIONS[replica.state], f"{replica} cannot become {state}"
        self.bytes_in[replica.state] -= replica.room_bytes
        self.bytes_in[state] += replica.room_bytes
        replica.state = state
        if state is ReplicaState.COMPLETE:
            del self._incomplete[replica.ref.id]
            self._completed(replica)

    def remove(self, replica: Replica) -> None:
        """Forget a replica and free its room. Leases on it stay valid to end, and protect nothing."""
        if replica.state is ReplicaState.COMPLETE:
            self._evictor.remove(replica.ref.key)
            self._gone(replica)
        else:
            del self._incomplete[replica.ref.id]
            self._freed(replica)

    def clear(self) -> None:
        """Forget all: the segment is no longer a live node's. Leases on its replicas stay valid to end."""
        self._evictor.clear(self.complete)
        self.complete, self._incomplete = {}, {}

    def touch(self, replica: Replica) -> None:
        """A complete replica is used."""
        calls = self._calls
        replica.last_use = calls.so_far
        if calls.now - replica.counted_at >= calls.same_use_s:
            replica.counted_at = calls.now
            self._evictor.use(replica.ref.key)
        else:
            self._evictor.refresh(replica.ref.key)

    def pin(self, replica: Replica) -> None:
        """Keep a complete replica from eviction."""
        replica.pins += 1

    def unpin(self, replica: Replica) -> None:
        """Undo one `pin`; with the last one it may be evicted again, and has been used until now."""
        replica.pins -= 1
        if replica.pins == 0 and self.complete.get(replica.ref.key) is replica:
            replica.last_use = self._calls.so_far
            self._evictor.refresh(replica.ref.key)

    def replicas(self) -> list[Replica]:
        """All of them, in any state."""
        return [*self.complete.values(), *self._incomplete.values()]

    def stats(self) -> SegmentStats:
        """Use of the segment."""
        return SegmentStats(
            segment=self.segment,
            used_bytes=self.allocator.used,
            reserved_bytes=self.bytes_in[ReplicaState.RESERVED],
            retiring_bytes=self.bytes_in[ReplicaState.RETIRING],
            num_replicas=len(self.complete),
        )

    def check(self) -> None:
        """Assert every invariant. For tests."""
        self.allocator.check()
        self.chains.check()
        replicas = self.replicas()
        for state, total in self.bytes_in.items():
            assert total == sum(aligned(r.ref.length) for r in replicas if r.state is state)
        assert self.allocator.used == sum(self.bytes_in.values())
        for key, replica in self.complete.items():
            assert replica.state is ReplicaState.COMPLETE and replica.ref.key == key
        assert not any(r.state is ReplicaState.COMPLETE for r in self._incomplete.values())
        victim = self._evictor.victim()
        assert victim is None or self.complete[victim].pins == 0

    def _is_pinned(self, key: ChunkKey) -> bool:
        return self.complete[key].pins > 0

    def _completed(self, replica: Replica) -> None:
        replica.last_use, replica.counted_at = self._calls.so_far, self._calls.now
        self.complete[replica.ref.key] = replica
        self._evictor.add(replica.ref.key)

    def _evict_next(self, evicted: list[Replica]) -> bool:
        """Whether there was one that may go; it is the last of `evicted` then."""
        key = self._evictor.evict()
        if key is None:
            return False
        evicted.append(self.complete[key])
        self._gone(evicted[-1])
        return True

    def _gone(self, replica: Replica) -> None:
        del self.complete[replica.ref.key]
        self._freed(replica)

    def _freed(self, replica: Replica) -> None:
        self.bytes_in[replica.state] -= replica.room_bytes
        self.allocator.release(replica.ref.offset)


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
