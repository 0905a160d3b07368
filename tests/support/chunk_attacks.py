"""What an attacker without the cluster's secret can make of a chunk that it can read and write: bytes to put in its
place.

Each takes the chunk that lies there and another one that it has read elsewhere, header and payload, and gives what it
writes. All have right CRCs and checksums: those anybody can compute.
"""

import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kvcore.trust.secrets import Secrets
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack, parse
from kvstore.integrity.checks import Integrity
from kvstore.manifest import scan
from kvstore.types import GetOutcome

CLUSTER, OTHER_CLUSTER = (Secrets((bytes(range(start, start + 32)),)) for start in (0, 100))


def sealed_chunk(integrity: Integrity, header: ChunkHeader, payload: bytes) -> bytes:
    """As a process with this integrity writes it into a segment."""
    if not integrity.encrypt:
        return pack(integrity.seal(header, [memoryview(payload)])) + payload
    made = memoryview(bytearray(len(payload)))
    return pack(integrity.encrypted(header, [memoryview(payload)], made)) + made


def cut(chunk: bytes) -> tuple[ChunkHeader, bytes]:
    """Header and payload."""
    header = parse(chunk)
    assert header is not None
    return header, chunk[HEADER_BYTES:]


def whole(header: ChunkHeader, payload: bytes) -> bytes:
    """With the payload's checksum."""
    return pack(replace(header, checksum=checksum([memoryview(payload)]))) + payload


def with_bytes(raw: bytes, offset: int, value: bytes) -> bytes:
    """The header with those bytes at `offset`, and a right CRC."""
    body = bytearray(raw[:-4])
    body[offset : offset + len(value)] = value
    return bytes(body) + zlib.crc32(body).to_bytes(4, "little")


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
    return sealed_chunk(Integrity("mac", OTHER_CLUSTER, encrypt=header.encrypted), header, payload)


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


@contextmanager
def segments(pids: Mapping[str, int], nodes: Iterable[str]) -> Iterator[list[memoryview]]:
    """The nodes' memory, as any process of the same user can map it."""
    mapped = []
    for name in nodes:
        descriptors = Path(f"/proc/{pids[name]}/fd").iterdir()
        found = next(one for one in descriptors if str(one.readlink()).startswith(f"/memfd:kvferry-{name}."))
        with found.open("r+b", buffering=0) as file:
            mapped.append(mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size))
    views = [memoryview(memory) for memory in mapped]
    yield views
    for view, memory in zip(views, mapped, strict=True):
        view.release()
        memory.close()


def change_all(memories: Sequence[memoryview], attack: str, chunk_tokens: int) -> int:
    """Each full chunk that lies there, made into what the attack makes of it and of another one. How many."""
    changed = 0
    for memory in memories:
        places = [(entry.offset, entry.offset + entry.length) for entry in scan(memory)]
        there = [bytes(memory[start:end]) for start, end in places]
        full = [at for at, chunk in enumerate(there) if cut(chunk)[0].token_count == chunk_tokens]
        for at, other in zip(full, [*full[1:], *full[:1]], strict=True):
            start, end = places[at]
            memory[start:end] = ATTACKS[attack].change(there[at], there[other])
            changed += 1
    return changed
