"""What lies in a slab: which chunk where, which of them goes first, and which are pinned. Pure but for the clock.

Owns extents and places in the table; the file is `kvstore.tiers.disk_file`'s. Invariants: a place or an extent is given
to nobody before it was given back; pinned chunks take no more than their share, and none of a tenant is added beyond
the tenant's.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from kvcore.clock import Clock
from kvcore.eviction.chains import Chains
from kvcore.eviction.evictor import Evictor, PolicyName, new_policy
from kvcore.eviction.quotas import TenantLimit, TenantQuotas, TenantShares
from kvcore.extents import ExtentAllocator, aligned
from kvcore.types import ChunkKey, OwnerTag
from kvstore.tiers.base import ChunkName
from kvstore.tiers.disk_batch import HeldChunk
from kvstore.tiers.disk_file import SlabEntry, disjoint, name_of_entry, owner_of_entry
from kvstore.tiers.disk_order import SlabOrder


class SlabPins:
    """Names that are pinned, those that lie there and those to come, and what the former take."""

    def __init__(self, most_bytes: int, max_names: int) -> None:
        self.most_bytes, self.held_bytes = most_bytes, 0
        self._max_names = max_names
        self._until: dict[ChunkName, float | None] = {}
        """On the clock; None: until they are unpinned."""
        self._held: dict[ChunkName, int] = {}
        """Of those that lie there and are kept: the bytes that they take."""
        self._ends: list[tuple[float, bytes, bytes]] = []
        """A heap of ends with their names, of ends that were changed too."""

    def __repr__(self) -> str:
        return f"<SlabPins of {len(self._until)} names, {self.held_bytes} of {self.most_bytes} bytes>"

    def __contains__(self, name: ChunkName) -> bool:
        """Whether the chunk lies there and is kept."""
        return name in self._held

    def pin(self, name: ChunkName, until: float | None, num_bytes: int | None) -> bool:
        """`num_bytes`: that it takes; None: it does not lie there yet. False: that is more than pins may have."""
        new = 0 if num_bytes is None or name in self._held else num_bytes
        if self.held_bytes + new > self.most_bytes or (name not in self._until and len(self._until) == self._max_names):
            return False
        self._until[name] = until
        if until is not None:
            heapq.heappush(self._ends, (until, name.fingerprint, name.key))
        if num_bytes is not None:
            self._hold(name, num_bytes)
        return True

    def unpin(self, name: ChunkName) -> bool:
        """False: it was not pinned."""
        if name not in self._until:
            return False
        del self._until[name]
        self.left(name)
        return True

    def came(self, name: ChunkName, num_bytes: int) -> None:
        """It lies there from now on."""
        if name in self._until and self.held_bytes + num_bytes <= self.most_bytes:
            self._hold(name, num_bytes)

    def left(self, name: ChunkName) -> None:
        """It does not lie there any more, or is not kept."""
        self.held_bytes -= self._held.pop(name, 0)

    def ended(self, now: float) -> Iterator[ChunkName]:
        """Unpin what has ended; those that lay there."""
        while self._ends and self._ends[0][0] <= now:
            end, fingerprint, key = heapq.heappop(self._ends)
            name = ChunkName(fingerprint, ChunkKey(key))
            if self._until.get(name) == end:
                held = name in self._held
                self.unpin(name)
                if held:
                    yield name

    def _hold(self, name: ChunkName, num_bytes: int) -> None:
        if name not in self._held:
            self._held[name] = num_bytes
            self.held_bytes += num_bytes


class SlabIndex:
    """Used on one event loop. `evicted` counts what made room, since start."""

    def __init__(
        self,
        *,
        data_offset: int,
        data_bytes: int,
        num_entries: int,
        entries: Sequence[SlabEntry],
        clock: Clock,
        eviction: PolicyName,
        pin_share: float,
        shares: TenantShares | None = None,
    ) -> None:
        """`entries`: what the table says. `shares`: of the slab, that tenants' chunks may take; None: any."""
        self.evicted = 0
        self.to_clear: list[int] = []
        """Places in the table of what left the index, still to be cleared."""
        self.chunks: OrderedDict[ChunkName, HeldChunk] = OrderedDict()
        """Those used last at the end."""
        self.pins = SlabPins(int(pin_share * data_bytes), num_entries)
        self._clock, self._data_offset = clock, data_offset
        self._chains = Chains[ChunkName]()
        """Told of each prompt that is asked for: its chunks may come in several batches, its last ones last."""
        self._evictor: Evictor[ChunkName] = Evictor(new_policy(eviction), self._stays)
        self._names: dict[int, ChunkName] = {}
        """Of `chunks`, by their places in the table."""
        self._quotas: TenantQuotas | None = None
        if shares is not None and shares.limited:
            limit = TenantLimit(shares, lambda: SlabOrder(eviction, self._stays, self._names))
            self._quotas = TenantQuotas(limit, data_bytes)
        taken = []
        for entry in disjoint(entries, clock.wall()):
            taken.append((entry.offset - data_offset, entry.num_bytes))
            held = HeldChunk(entry)
            self.claim(held)
            self.keep(name_of_entry(entry), held)
        used = {held.entry.number for held in self.chunks.values()}
        self.extents = ExtentAllocator(data_bytes, taken)
        self.free_numbers = [number for number in reversed(range(num_entries)) if number not in used]
        self.to_clear += [entry.number for entry in entries if entry.number not in used]

    def alive(self, name: ChunkName) -> HeldChunk | None:
        """The chunk, unless its time is up; that of a pinned one is not."""
        held = self.chunks.get(name)
        if held is not None and 0 < held.entry.ends_at <= self._clock.wall() and name not in self.pins:
            return None
        return held

    def touch(self, name: ChunkName, held: HeldChunk) -> None:
        """It is used."""
        held.entry.used_at = self._clock.wall()
        if name in self.chunks:
            self.chunks.move_to_end(name)
            self._evictor.use(name)
            if self._quotas is not None:
                self._quotas.used([held.entry.number], again=False)

    def keep(self, name: ChunkName, held: HeldChunk) -> None:
        """It lies there from now on."""
        self.chunks[name] = held
        self._names[held.entry.number] = name
        self._chains.came(name)
        self._evictor.add(name)
        if self._quotas is not None:
            self._quotas.completed([held.entry.number])
        self.pins.came(name, aligned(held.entry.num_bytes))

    def link(self, names: Sequence[ChunkName]) -> None:
        """See `LocalTier`."""
        self._chains.link(names)

    def claim(self, held: HeldChunk) -> None:
        """Its extent and its place are taken, of its owner's share, until `give_back`."""
        if self._quotas is not None and (owner := owner_of_entry(held.entry)) is not None:
            self._quotas.own(held.entry.number, owner, aligned(held.entry.num_bytes))

    def owners(self, names: Iterable[ChunkName]) -> list[OwnerTag | None]:
        """See `LocalTier`."""
        there = map(self.chunks.get, names)
        return [None if held is None else owner_of_entry(held.entry) for held in there]

    def make_room(self, num_bytes: int, owner: OwnerTag | None, left: list[ChunkName]) -> int | None:
        """An extent, after as many evictions as it takes, which are added to `left`; None: nothing else may go. Of an
        owner that has its share, only its own go."""
        quotas = self._quotas
        if quotas is not None and owner is not None and quotas.left_of(owner) < aligned(num_bytes):
            self._refresh(self.pins.ended(self._clock.now()))
            return self._make_room_of_own(quotas, num_bytes, owner, left)
        while True:
            offset = self.extents.allocate(num_bytes) if self.free_numbers else None
            if offset is not None:
                return offset
            self._refresh(self.pins.ended(self._clock.now()))
            victim = self._evictor.evict()
            if victim is None:
                return None
            if quotas is not None:
                quotas.left(self.chunks[victim].entry.number)
            self._evicted(victim, left)

    def drop(self, name: ChunkName) -> None:
        """It is to go, whatever it is."""
        self._evictor.remove(name)
        if self._quotas is not None:
            self._quotas.left(self.chunks[name].entry.number)
        self._let_go(name)

    def done(self, name: ChunkName, held: HeldChunk) -> None:
        """One who was busy with it is no longer."""
        held.busy -= 1
        if held.gone and not held.busy:
            self.give_back(held)
        elif not held.busy and self.chunks.get(name) is held:
            self._refresh([name])

    def give_back(self, held: HeldChunk) -> None:
        """Its extent and its place are free."""
        self.extents.release(held.entry.offset - self._data_offset, held.entry.num_bytes)
        self.free_numbers.append(held.entry.number)
        if self._quotas is not None:
            self._quotas.freed(held.entry.number, aligned(held.entry.num_bytes))

    def pin(self, names: Iterable[ChunkName], ttl_s: float | None) -> tuple[int, int]:
        """See `LocalTier`."""
        until = None if ttl_s is None else self._clock.now() + ttl_s
        self._refresh(self.pins.ended(self._clock.now()))
        kept = refused = 0
        for name in dict.fromkeys(names):
            held = self.alive(name)
            room = None if held is None else aligned(held.entry.num_bytes)
            if refused or not self.pins.pin(name, until, room):
                refused += held is not None
            else:
                kept += held is not None
        return kept, refused

    def unpin(self, names: Iterable[ChunkName]) -> int:
        """See `LocalTier`."""
        pinned = [name for name in dict.fromkeys(names) if name in self.pins]
        for name in names:
            self.pins.unpin(name)
        self._refresh(pinned)
        return len(pinned)

    def pinned(self, names: Iterable[ChunkName]) -> list[bool]:
        """See `LocalTier`."""
        self._refresh(self.pins.ended(self._clock.now()))
        return [name in self.pins for name in names]

    def _stays(self, name: ChunkName) -> bool:
        return self.chunks[name].busy > 0 or name in self.pins or self._chains.is_prefix(name)

    def _refresh(self, names: Iterable[ChunkName]) -> None:
        for name in names:
            if (held := self.chunks.get(name)) is not None:
                self._evictor.refresh(name)
                if self._quotas is not None:
                    self._quotas.used([held.entry.number], again=True)

    def _make_room_of_own(
        self, quotas: TenantQuotas, num_bytes: int, owner: OwnerTag, left: list[ChunkName]
    ) -> int | None:
        """Also against fragmentation, but no more bytes for that than twice what is asked."""
        size, spent = aligned(num_bytes), 0
        while size <= quotas.most_of(owner):
            fits = quotas.left_of(owner) >= size
            offset = self.extents.allocate(num_bytes) if fits and self.free_numbers else None
            if offset is not None or spent >= 2 * size or (number := quotas.evict(owner)) is None:
                return offset
            name = self._names[number]
            spent += aligned(self.chunks[name].entry.num_bytes) if fits else 0
            self._evictor.remove(name)
            self._evicted(name, left)
        return None

    def _evicted(self, name: ChunkName, left: list[ChunkName]) -> None:
        self._let_go(name)
        self.evicted += 1
        left.append(name)

    def _let_go(self, name: ChunkName) -> None:
        held = self.chunks.pop(name)
        del self._names[held.entry.number]
        self.pins.left(name)
        if (prefix := self._chains.left(name)) is not None:
            self._evictor.let_go(prefix)
            if self._quotas is not None and (there := self.chunks.get(prefix)) is not None:
                self._quotas.let_go(there.entry.number)
        self.to_clear.append(held.entry.number)
        held.gone = True
        if not held.busy:
            self.give_back(held)

    def check(self) -> None:
        """Assert every invariant of quotas. For tests."""
        assert self._names == {held.entry.number: name for name, held in self.chunks.items()}
        if self._quotas is not None:
            rooms = {held.entry.number: aligned(held.entry.num_bytes) for held in self.chunks.values()}
            self._quotas.check(rooms, self._names)
