"""What an attacker without the cluster's secret can make of a chunk that it can read and write: bytes to put in its
place.

Each takes the chunk that lies there and another one that it has read elsewhere, header and payload, and gives what it
writes. All have right CRCs and checksums: those anybody can compute.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvcore.trust.secrets import Secrets
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack, parse
from kvstore.integrity.checks import Integrity
from kvstore.types import GetOutcome

CLUSTER, OTHER_CLUSTER = (Secrets((bytes(range(start, start + 32)),)) for start in (0, 100))


def cut(chunk: bytes) -> tuple[ChunkHeader, bytes]:
    """Header and payload."""
    header = parse(chunk)
    assert header is not None
    return header, chunk[HEADER_BYTES:]


def whole(header: ChunkHeader, payload: bytes) -> bytes:
    """With the payload's checksum."""
    return pack(replace(header, checksum=checksum([memoryview(payload)]))) + payload


def forge(there: bytes, other: bytes) -> bytes:
    """One bit of it."""
    header, payload = cut(there)
    return whole(header, bytes([payload[0] ^ 1]) + payload[1:])


def replay(there: bytes, other: bytes) -> bytes:
    """Another prompt's chunk under this one's key, as if it lay there."""
    mine, (theirs, payload) = cut(there)[0], cut(other)
    return whole(replace(theirs, key=mine.key, generation=mine.generation), payload)


def swap(there: bytes, other: bytes) -> bytes:
    """Another tenant's chunk, under this one's key and as this tenant's."""
    mine, (theirs, payload) = cut(there)[0], cut(other)
    return whole(replace(theirs, key=mine.key, generation=mine.generation, owner=mine.owner), payload)


def graft(there: bytes, other: bytes) -> bytes:
    """Another chunk's payload under this one's header."""
    return whole(cut(there)[0], cut(other)[1])


def bare(there: bytes, other: bytes) -> bytes:
    """Without a MAC, as if there were no secret."""
    header, payload = cut(forge(there, other))
    empty = ChunkHeader(header.key, header.fingerprint, header.token_count, header.payload_length, 0, header.generation)
    return whole(replace(empty, owner=header.owner), payload)


def foreign(there: bytes, other: bytes) -> bytes:
    """As another cluster, that has a secret of its own, writes it."""
    header, payload = cut(forge(there, other))
    return pack(Integrity("mac", OTHER_CLUSTER).seal(header, [memoryview(payload)])) + payload


def foreign_renamed(there: bytes, other: bytes) -> bytes:
    """The same, made to look as if it were under this cluster's secret."""
    header, payload = cut(foreign(there, other))
    return whole(replace(header, key_id=cut(there)[0].key_id), payload)


@dataclass(frozen=True)
class Attack:
    """How it is done, and what a reader with the secret says of it."""

    change: Callable[[bytes, bytes], bytes]
    outcome: GetOutcome


ATTACKS = {
    "forge": Attack(forge, GetOutcome.FORGED),
    "replay": Attack(replay, GetOutcome.FORGED),
    "swap": Attack(swap, GetOutcome.FORGED),
    "graft": Attack(graft, GetOutcome.FORGED),
    "bare": Attack(bare, GetOutcome.UNPROVEN),
    "foreign": Attack(foreign, GetOutcome.UNPROVEN),
    "foreign_renamed": Attack(foreign_renamed, GetOutcome.FORGED),
}
