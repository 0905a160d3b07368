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
from kvcore.types import ChunkKey, OwnerTag, ReplicaRef, Segment
from metadata_server.account_messages import SegmentStats
from metadata_server.index.quotas import SegmentQuotas, TenantLimit
from metadata_server.messages import ManifestEntry


class ReplicaState(StrEnum):
    """The life of one replica:

    | from | to | when |
    |---|---|---|
    | new | reserved | room is given to a writer |
    | new | complete | found by its header, in a manifest |
    | reserved | complete | commit |
    | reserved | retiring | abort; its time is up; its writer died |
    | reserved | gone | its segment was dropped |
    | complete | retiring | quarantined, and others still read from its room |
    | retiring | gone | the grace time is over and nobody reads there; its segment was dropped |
    | complete | gone | evicted; quarantined; its segment was dropped |
    """

    RESERVED = "reserved"
    COMPLETE = "complete"
    RETIRING = "retiring"
    """Its writer may still be writing, or others reading: nobody else may use the room yet."""


TRANSITIONS: dict[ReplicaState | None, frozenset[ReplicaState | None]] = {
    None: frozenset({ReplicaState.RESERVED, ReplicaState.COMPLETE}),
    ReplicaState.RESERVED: frozenset({ReplicaState.COMPLETE, ReplicaState.RETIRING, None}),
    ReplicaState.RETIRING: frozenset({None}),
    ReplicaState.COMPLETE: frozenset({ReplicaState.RETIRING, None}),
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
        tenants: TenantLimit | None = None,
    ) -> None:
        """`taken` as `acceptable` gave them; each is then to be added by `add`. `calls`: the same for all segments.
        `chains` is told of a complete replica before it is added. `tenants`: what each may have."""
        self.segment = segment
        self.allocator = ExtentAllocator(segment.size_bytes, [(entry.offset, entry.length) for entry in taken])
        self.complete: dict[ChunkKey, Replica] = {}
        self._incomplete: dict[int, Replica] = {}
        """Reserved and retiring ones, by id."""
        self.chains = chains
        """What continues what in this segment."""
        self._evictor = Evictor(policy, chains, self._is_pinned)
        self._quotas: SegmentQuotas | None = None
        if tenants is not None:
            self._quotas = SegmentQuotas(tenants, self.allocator.capacity, chains, self._is_pinned)
        self._calls = calls
        self.bytes_in = dict.fromkeys(ReplicaState, 0)
        self.rebuilding = False  # while not all is known that lies here: it gives no room, and nothing is evicted

    def __repr__(self) -> str:
        use = f"{self.allocator.used} of {self.allocator.capacity} bytes"
        count = len(self.complete) + len(self._incomplete)
        return f"<SegmentRecord {self.segment.id}: {use}, {count} replicas, {self._evictor}>"

    @property
    def idle_calls(self) -> int:
        """Calls since the last use of the replica that is evicted next; -1: none can be."""
        victim = None if self.rebuilding else self._evictor.victim()
        return -1 if victim is None else self._calls.so_far - self.complete[victim].last_use

    def is_over(self, owner: OwnerTag | None, length: int) -> bool:
        """Whether this would be more than the tenant may have here. None: not known, and not limited."""
        return self._quotas is not None and owner is not None and not self._quotas.fits(owner, aligned(length))

    def allocate(self, length: int, high: float, owner: OwnerTag | None = None) -> int | None:
        """Room that needs no eviction: the use stays at or under the share `high`, or this is all. Offset or None."""
        used = self.allocator.used
        if self.rebuilding or self.is_over(owner, length):
            return None
        if used and used + aligned(length) > high * self.allocator.capacity:
            return None
        return self.allocator.allocate(length)

    def allocate_evicting(
        self, length: int, high: float, low: float, *, old_calls: float = 0.0, owner: OwnerTag | None = None
    ) -> tuple[int | None, list[Replica]]:
        """Room, after eviction if the use would pass the share `high`; with what was evicted.

        Goes on down to the share `low` with what was not used for `old_calls`. Also evicts against fragmentation, but
        no more bytes than that than twice what is asked. A tenant that would pass its share: only its own is evicted.
        """
        size, space = aligned(length), self.allocator
        if self.rebuilding or size > space.capacity:
            return None, []
        if owner is not None and self.is_over(owner, length):
            return self._allocate_from_own(length, owner)
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

    def take(self, entry: ManifestEntry) -> bool:
        """Take the room of what is told; its replica is then to be added. False: it is taken, or its key known."""
        return entry.key not in self.complete and self.allocator.take(entry.offset, entry.length)

    def add(self, replica: Replica) -> None:
        """Add a replica whose extent is allocated already."""
        assert replica.state in TRANSITIONS[None]
        replica.room_bytes = aligned(replica.ref.length)
        self.bytes_in[replica.state] += replica.room_bytes
        if replica.state is ReplicaState.COMPLETE:
            self._completed(replica)
        else:
            self._incomplete[replica.ref.id] = replica

    def own(self, replica: Replica, owner: OwnerTag) -> None:
        """Say whose replica it is, if that is not known yet."""
        quotas, number = self._quotas, replica.ref.id
        if quotas is None or not quotas.own(number, owner, replica.room_bytes):
            return
        if replica.state is ReplicaState.COMPLETE:
            quotas.completed(number, replica.ref.key)

    def set_state(self, replica: Replica, state: ReplicaState) -> None:
        """Move a replica on."""
        assert state in TRANSITIONS[replica.state], f"{replica} cannot become {state}"
        if replica.state is ReplicaState.COMPLETE:
            self._evictor.remove(replica.ref.key)
            self._incomplete[replica.ref.id] = self.complete.pop(replica.ref.key)
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
        if self._quotas is not None:
            self._quotas.clear()

    def touch(self, replica: Replica) -> None:
        """A complete replica is used."""
        calls = self._calls
        replica.last_use = calls.so_far
        again = calls.now - replica.counted_at < calls.same_use_s
        if not again:
            replica.counted_at = calls.now
            self._evictor.use(replica.ref.key)
        else:
            self._evictor.refresh(replica.ref.key)
        if self._quotas is not None:
            self._quotas.used(replica.ref.id, replica.ref.key, again=again)

    def pin(self, replica: Replica) -> None:
        """Keep a complete replica from eviction."""
        replica.pins += 1

    def unpin(self, replica: Replica) -> None:
        """Undo one `pin`; with the last one it may be evicted again, and has been used until now."""
        replica.pins -= 1
        if replica.pins == 0 and self.complete.get(replica.ref.key) is replica:
            replica.last_use = self._calls.so_far
            self._evictor.refresh(replica.ref.key)
            if self._quotas is not None:
                self._quotas.used(replica.ref.id, replica.ref.key, again=True)

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
            rebuilding=self.rebuilding,
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
        if self._quotas is not None:
            rooms = {replica.ref.id: replica.room_bytes for replica in replicas}
            self._quotas.check(rooms, {key: replica.ref.id for key, replica in self.complete.items()})

    def _is_pinned(self, key: ChunkKey) -> bool:
        return self.complete[key].pins > 0

    def _completed(self, replica: Replica) -> None:
        replica.last_use, replica.counted_at = self._calls.so_far, self._calls.now
        self.complete[replica.ref.key] = replica
        self._evictor.add(replica.ref.key)
        if self._quotas is not None:
            self._quotas.completed(replica.ref.id, replica.ref.key)

    def _allocate_from_own(self, length: int, owner: OwnerTag) -> tuple[int | None, list[Replica]]:
        """Room for a tenant that has its share: what makes it is its own, and no other's."""
        quotas, size = self._quotas, aligned(length)
        assert quotas is not None
        if size > quotas.most_bytes:
            return None, []
        evicted, spent = list[Replica](), 0
        while not quotas.fits(owner, size) or (self.allocator.largest_free < size and spent < 2 * size):
            fits = quotas.fits(owner, size)
            key = quotas.evict(owner)
            if key is None:
                break
            evicted.append(self.complete.pop(key))
            self._evictor.remove(key)
            self._freed(evicted[-1])
            spent += evicted[-1].room_bytes if fits else 0
        return self.allocator.allocate(length) if quotas.fits(owner, size) else None, evicted

    def _evict_next(self, evicted: list[Replica]) -> bool:
        """Whether there was one that may go; it is the last of `evicted` then."""
        key = self._evictor.evict()
        if key is None:
            return False
        evicted.append(self.complete[key])
        self._gone(evicted[-1])
        return True

    def _gone(self, replica: Replica) -> None:
        if self._quotas is not None:
            self._quotas.left(replica.ref.id, replica.ref.key)
        del self.complete[replica.ref.key]
        self._freed(replica)

    def _freed(self, replica: Replica) -> None:
        self.bytes_in[replica.state] -= replica.room_bytes
        self.allocator.release(replica.ref.offset)
        if self._quotas is not None:
            self._quotas.freed(replica.ref.id, replica.room_bytes)


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
