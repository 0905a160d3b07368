"""This node's segment as its tiers meet it: chunks in place, read under a lease and written into reserved room.

Owns no memory and no policy. Invariants: nothing is read without a lease on it, nothing is written into room that is
not reserved for us, or after the time for it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from kvcore.types import ChunkKey, OwnerTag, ReplicaRef
from kvstore.chunk_format import HEADER_BYTES, Expected, pack, parse
from kvstore.integrity.checks import Integrity
from kvstore.placement import Placement, Reserved
from kvstore.tiers.base import ChunkName, TierChunk
from kvstore.types import GetOutcome, Match


@dataclass(frozen=True, slots=True)
class LeasedChunks:
    """Chunks that lie in the segment. `looked_at`: how many of the keys asked for were looked at, one at least."""

    match: Match
    chunks: list[TierChunk]
    looked_at: int


@dataclass(slots=True)
class ReservedRoom:
    """Room in the segment. `chunks[key]`: where the chunk goes, header and payload."""

    reserved: Reserved
    chunks: dict[ChunkKey, TierChunk] = field(default_factory=dict)
    taken: set[ChunkKey] = field(default_factory=set)
    """Committed, or refused at commit: no longer ours to give back."""

    @property
    def write_by(self) -> float:
        """On the clock: nothing is written later."""
        return self.reserved.write_by


class OwnSegment:
    """`view` is the segment's memory, `segment_id` its name at the metadata server. `integrity`: how what comes from
    tiers is checked."""

    def __init__(
        self, view: memoryview, segment_id: str, placement: Placement, integrity: Integrity = Integrity()
    ) -> None:
        self.segment_id = segment_id
        self.node_id = segment_id.rpartition(".")[0]
        self.size_bytes = view.nbytes
        self._view = view
        self._placement, self.integrity = placement, integrity

    def __repr__(self) -> str:
        return f"<OwnSegment {self.segment_id}, {self.size_bytes} bytes>"

    async def num_complete(self, keys: Sequence[ChunkKey], *, timeout_s: float) -> int:
        """How many leading keys are complete in some segment of the cluster; 0 too if nobody can say."""
        return (await self._placement.match(keys, timeout_s, leased=False)).num_chunks

    async def lease(self, keys: Sequence[ChunkKey], *, timeout_s: float) -> LeasedChunks:
        """Those of `keys`, of whatever prompts, up to the first that is gone which lie here. `release` them after
        use."""
        match = await self._placement.match(keys, timeout_s, in_order=False)
        found = []
        for replicas in match.replicas:
            for replica in replicas:
                if replica.segment_id == self.segment_id and (chunk := self._chunk_at(replica)) is not None:
                    found.append(chunk)
        return LeasedChunks(match, found, max(1, match.num_chunks))

    def renewing(self, leased: LeasedChunks) -> AbstractContextManager[None]:
        """The chunks are read inside of the context: their lease does not run out meanwhile."""
        return self._placement.renewing(leased.match)

    async def release(self, leased: LeasedChunks) -> None:
        """Give the lease back."""
        await self._placement.release(leased.match)

    async def reserve(
        self, names: Sequence[ChunkName], num_bytes: int, *, owner: OwnerTag | None = None, timeout_s: float
    ) -> ReservedRoom:
        """Room for chunks of `num_bytes`, header included, in this segment alone: for those that are nowhere yet and
        find room. `owner`: whose they are, if that is known. `give_back` it after use."""
        lengths = {name.key: num_bytes for name in names}
        reserved = await self._placement.reserve(
            lengths, self.segment_id, timeout_s, only_preferred=True, in_order=False, owner=owner
        )
        room = ReservedRoom(reserved)
        for name in names:
            place = reserved.granted.get(name.key)
            if place is not None and place.segment_id == self.segment_id:
                room.chunks[name.key] = TierChunk(name, [self._view[place.offset : place.offset + place.length]])
        return room

    def check(self, room: ReservedRoom, key: ChunkKey) -> GetOutcome:
        """Whether what was loaded into `key`'s room is that chunk, whole; then its header says where it lies now.

        Reads every byte: run it on a thread.
        """
        chunk, place = room.chunks[key], room.reserved.granted[key]
        memory = chunk.memory[0]
        header = parse(memory[:HEADER_BYTES])
        if header is None:
            return GetOutcome.MALFORMED
        owner, payload_bytes = room.reserved.owner, place.length - HEADER_BYTES
        expected = Expected(key, chunk.name.fingerprint, header.generation, payload_bytes, owner)
        outcome = self.integrity.check(memory[:HEADER_BYTES], expected, [memory[HEADER_BYTES:]])
        if outcome is GetOutcome.OK:
            memory[:HEADER_BYTES] = pack(replace(header, generation=place.generation))
        return outcome

    async def commit(self, room: ReservedRoom, keys: Sequence[ChunkKey], *, timeout_s: float) -> set[ChunkKey]:
        """Make `keys` visible; returns those that are. None of them is given back later."""
        if not keys:
            return set()
        answers = await self._placement.commit([room.reserved.granted[key].id for key in keys], timeout_s)
        if answers is None:
            return set()
        room.taken.update(keys)
        return {key for key, visible in zip(keys, answers, strict=True) if visible}

    async def give_back(self, room: ReservedRoom) -> None:
        """What was not committed. Survives the caller's cancellation."""
        left = {key: replica for key, replica in room.reserved.granted.items() if key not in room.taken}
        await self._placement.give_back(Reserved(left, frozenset(), room.reserved.segments, room.reserved.write_by))

    def _chunk_at(self, replica: ReplicaRef) -> TierChunk | None:
        memory = self._view[replica.offset : replica.offset + replica.length]
        header = parse(memory[:HEADER_BYTES])
        if header is None or (header.key, header.generation) != (replica.key, replica.generation):
            return None
        return TierChunk(ChunkName(header.fingerprint, header.key), [memory])
