"""The frame of an encoded chunk: what stands between its header and its encoded payload. Pure.

Layout: docs/wire-formats.md, "An encoded chunk". Invariant: an encoded chunk has another length than the chunk itself,
so its length alone tells it from one that lies there as it is.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from kvcore.trust.keys import KEY_ID_BYTES
from kvstore.chunk_format import HEADER_BYTES, NONCE_BYTES, parse

MAGIC = b"KVFCODEC"
_PLAIN, _ENCRYPTED = 1, 2
"""Versions."""
FRAME_BYTES = 64
FRONT_BYTES = HEADER_BYTES + FRAME_BYTES
"""The chunk's header and the frame."""

ENCRYPTION_BYTES = 24
"""What encryption adds to a body: a checksum in front, a tag behind."""
MORE_BYTES = FRAME_BYTES + ENCRYPTION_BYTES
"""By how much an encoded chunk may be longer than the chunk itself."""

_FIELDS = struct.Struct(f"<8sHHHHQ{KEY_ID_BYTES}s{NONCE_BYTES}s")
_CRC = struct.Struct("<I")
_CRC_AT = FRAME_BYTES - _CRC.size
_RESERVED = bytes(_CRC_AT - _FIELDS.size)


class CodecKind(IntEnum):
    """By what a payload was encoded."""

    NONE = 0
    """It is encrypted, and nothing else."""
    LOSSLESS = 1
    INT8 = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """`kind`: a CodecKind, or one that is not known here. `element_bytes`: of a number of the payload. `body_bytes`: of
    the encoded payload behind the frame. `key_id`: of the secret under which it is encrypted; zeros: it is not."""

    kind: int
    element_bytes: int
    body_bytes: int
    key_id: bytes = bytes(KEY_ID_BYTES)
    nonce: bytes = bytes(NONCE_BYTES)

    @property
    def encrypted(self) -> bool:
        """Whether the body is."""
        return any(self.key_id)


def pack_frame(frame: Frame) -> bytes:
    """FRAME_BYTES."""
    version = _ENCRYPTED if frame.encrypted else _PLAIN
    fields = _FIELDS.pack(
        MAGIC,
        version,
        FRAME_BYTES,
        frame.kind,
        frame.element_bytes,
        frame.body_bytes,
        frame.key_id,
        frame.nonce,
    )
    body = fields + _RESERVED
    return body + _CRC.pack(zlib.crc32(body))


def parse_frame(raw: bytes | memoryview) -> Frame | None:
    """The frame in the first FRAME_BYTES of `raw`; None if it is none."""
    if len(raw) < FRAME_BYTES:
        return None
    body = bytes(raw[:_CRC_AT])
    magic, version, length, kind, element_bytes, body_bytes, key_id, nonce = _FIELDS.unpack_from(body)
    frame = Frame(kind, element_bytes, body_bytes, key_id, nonce)
    if (magic, length) != (MAGIC, FRAME_BYTES) or version != (_ENCRYPTED if frame.encrypted else _PLAIN):
        return None
    if not frame.encrypted and (any(nonce) or kind == CodecKind.NONE):
        return None
    if body[_FIELDS.size :] != _RESERVED or _CRC.unpack_from(raw, _CRC_AT)[0] != zlib.crc32(body):
        return None
    return frame


def is_whole(front: bytes, num_bytes: int) -> bool:
    """Whether what begins with `front`, FRONT_BYTES of it or all, is a chunk of `num_bytes` in all, encoded or not."""
    header = parse(front)
    if header is None:
        return False
    if num_bytes == HEADER_BYTES + header.payload_length:
        return True
    frame = parse_frame(front[HEADER_BYTES:])
    if frame is None or num_bytes != FRONT_BYTES + frame.body_bytes:
        return False
    more_bytes = num_bytes - HEADER_BYTES - header.payload_length
    return more_bytes <= MORE_BYTES if frame.encrypted else more_bytes < 0
