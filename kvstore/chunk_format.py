"""The header in front of every chunk in a segment: packed, parsed, and held against what a reader expected.

The layout is published in docs/wire-formats.md ("Chunk in a segment"). Owns no I/O. Invariant: bytes that `parse`
accepts were packed by `pack`, of a version that is known here, undamaged; `verify` alone says whether they are the
wanted chunk.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from kvcore.chunk_keys import OWNER_BYTES
from kvcore.trust.keys import KEY_ID_BYTES
from kvcore.types import ChunkKey, OwnerTag
from kvstore.types import GetOutcome

MAGIC = b"KVFCHUNK"
VERSION = 2
_WITHOUT_OWNER = 1
"""The version whose headers end with the generation. They are read still: tiers outlive an upgrade."""
ENCRYPTED = 3
"""The version of a chunk whose payload is encrypted, with the tag of that in place of its MAC. Else it is VERSION."""
NONCE_BYTES = 12
MAC_BYTES = 16
HEADER_BYTES = 128
ALIGNMENT = 4096
"""Extents begin at multiples of this, so that a scan need not look anywhere else."""

_FIELDS = struct.Struct(f"<8sHHI16s16sQQQ{OWNER_BYTES}s{NONCE_BYTES}s{MAC_BYTES}s{KEY_ID_BYTES}s")
_CRC = struct.Struct("<I")
_CRC_OFFSET = HEADER_BYTES - _CRC.size
_RESERVED = bytes(_CRC_OFFSET - _FIELDS.size)
_NO_OWNER = bytes(OWNER_BYTES)
_OWNER_OFFSET = _FIELDS.size - OWNER_BYTES - NONCE_BYTES - MAC_BYTES - KEY_ID_BYTES
_SINCE_OWNER = bytes(_CRC_OFFSET - _OWNER_OFFSET)
"""What was reserved, and zero, before."""


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What a header says. `checksum` is xxh3_64 (seed 0) of the payload as it lies there, `payload_length` in bytes.
    `owner`: whose quota the chunk counts for; None: not known. `nonce`, `mac` and `key_id`, which names the secret that
    the key comes from: zeros if there is none (`kvstore.integrity`). `encrypted`: the payload is, and `mac` is the tag
    of that."""

    key: ChunkKey
    fingerprint: bytes
    token_count: int
    payload_length: int
    checksum: int
    generation: int
    owner: OwnerTag | None = None
    nonce: bytes = bytes(NONCE_BYTES)
    mac: bytes = bytes(MAC_BYTES)
    key_id: bytes = bytes(KEY_ID_BYTES)
    encrypted: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """What a reader was told to find in a place. `payload_length` in bytes."""

    key: ChunkKey
    fingerprint: bytes
    generation: int
    payload_length: int
    owner: OwnerTag | None = None
    """None: whoever's."""


def checksum(payload: Sequence[memoryview]) -> int:
    """xxh3_64 of the views' bytes one after the other. Lets other threads run meanwhile; 35 to 60 GB/s."""
    if len(payload) == 1:
        return int(xxhash.xxh3_64_intdigest(payload[0]))
    digest = xxhash.xxh3_64()
    for view in payload:
        digest.update(view)
    return int(digest.intdigest())


def pack(header: ChunkHeader) -> bytes:
    """The HEADER_BYTES that stand in front of the payload. Raises ValueError for a field that does not fit."""
    owner = header.owner or _NO_OWNER
    if len(header.key) != 16 or len(header.fingerprint) != 16:
        raise ValueError("a chunk's key and fingerprint have 16 bytes each")
    lengths = (len(owner), len(header.nonce), len(header.mac), len(header.key_id))
    if lengths != (OWNER_BYTES, NONCE_BYTES, MAC_BYTES, KEY_ID_BYTES):
        raise ValueError(f"owner, nonce, MAC and the id of its key do not have {lengths} bytes")
    try:
        fields = _FIELDS.pack(
            MAGIC,
            ENCRYPTED if header.encrypted else VERSION,
            HEADER_BYTES,
            header.token_count,
            header.key,
            header.fingerprint,
            header.payload_length,
            header.checksum,
            header.generation,
            owner,
            header.nonce,
            header.mac,
            header.key_id,
        )
    except struct.error as error:
        raise ValueError(f"{header} does not fit the chunk header: {error}") from error
    body = fields + _RESERVED
    return body + _CRC.pack(zlib.crc32(body))


def parse(raw: bytes | bytearray | memoryview) -> ChunkHeader | None:
    """The header in the first HEADER_BYTES of `raw`; None if it is not one (magic, version, length, reserved, CRC)."""
    if len(raw) < HEADER_BYTES:
        return None
    body = bytes(raw[:_CRC_OFFSET])
    magic, version, header_length, *fields = _FIELDS.unpack_from(body)
    if magic != MAGIC or version not in (VERSION, _WITHOUT_OWNER, ENCRYPTED) or header_length != HEADER_BYTES:
        return None
    if body[_FIELDS.size :] != _RESERVED or _CRC.unpack_from(raw, _CRC_OFFSET)[0] != zlib.crc32(body):
        return None
    if version == _WITHOUT_OWNER and body[_OWNER_OFFSET:] != _SINCE_OWNER:
        return None
    token_count, key, fingerprint, payload_length, payload_checksum, generation, owner, nonce, mac, key_id = fields
    return ChunkHeader(
        key=ChunkKey(key),
        fingerprint=fingerprint,
        token_count=token_count,
        payload_length=payload_length,
        checksum=payload_checksum,
        generation=generation,
        owner=None if owner == _NO_OWNER else OwnerTag(owner),
        nonce=nonce,
        mac=mac,
        key_id=key_id,
        encrypted=version == ENCRYPTED,
    )


def header_outcome(header: ChunkHeader, expected: Expected) -> GetOutcome:
    """Whether the header is that of the expected chunk. Another fingerprint or owner is FOREIGN; another key or
    generation STALE: the place was given away."""
    if header.fingerprint != expected.fingerprint:
        return GetOutcome.FOREIGN
    if header.key != expected.key or header.generation != expected.generation:
        return GetOutcome.STALE
    if expected.owner is not None and header.owner not in (None, expected.owner):
        return GetOutcome.FOREIGN
    return GetOutcome.OK if header.payload_length == expected.payload_length else GetOutcome.MALFORMED


def verify(raw_header: bytes | memoryview, expected: Expected, payload: Sequence[memoryview]) -> GetOutcome:
    """Whether header and payload are the expected chunk, undamaged, as it lies there: encrypted or not. Forgery is
    `kvstore.integrity`'s matter."""
    header = parse(raw_header)
    if header is None or sum(view.nbytes for view in payload) != expected.payload_length:
        return GetOutcome.MALFORMED
    found = header_outcome(header, expected)
    if found is GetOutcome.OK and checksum(payload) != header.checksum:
        return GetOutcome.CHECKSUM
    return found
