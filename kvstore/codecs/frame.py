"""The frame of an encoded chunk: what stands between its header and its encoded payload. Pure.

Layout: docs/wire-formats.md, "An encoded chunk". Invariant: an encoded chunk is shorter than the chunk itself, so its
length alone tells it from one that lies there as it is.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from kvstore.chunk_format import HEADER_BYTES, parse

MAGIC = b"KVFCODEC"
VERSION = 1
FRAME_BYTES = 64
FRONT_BYTES = HEADER_BYTES + FRAME_BYTES
"""The chunk's header and the frame."""

_FIELDS = struct.Struct("<8sHHHHQ")
_CRC = struct.Struct("<I")
_CRC_AT = FRAME_BYTES - _CRC.size
_RESERVED = bytes(_CRC_AT - _FIELDS.size)


class CodecKind(IntEnum):
    """By what a payload was encoded."""

    LOSSLESS = 1
    INT8 = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """`kind`: a CodecKind, or one that is not known here. `element_bytes`: of a number of the payload. `body_bytes`: of
    the encoded payload behind the frame."""

    kind: int
    element_bytes: int
    body_bytes: int


def pack_frame(frame: Frame) -> bytes:
    """FRAME_BYTES."""
    fields = _FIELDS.pack(MAGIC, VERSION, FRAME_BYTES, frame.kind, frame.element_bytes, frame.body_bytes)
    body = fields + _RESERVED
    return body + _CRC.pack(zlib.crc32(body))


def parse_frame(raw: bytes | memoryview) -> Frame | None:
    """The frame in the first FRAME_BYTES of `raw`; None if it is none."""
    if len(raw) < FRAME_BYTES:
        return None
    body = bytes(raw[:_CRC_AT])
    magic, version, length, kind, element_bytes, body_bytes = _FIELDS.unpack_from(body)
    if (magic, version, length) != (MAGIC, VERSION, FRAME_BYTES):
        return None
    if body[_FIELDS.size :] != _RESERVED or _CRC.unpack_from(raw, _CRC_AT)[0] != zlib.crc32(body):
        return None
    return Frame(kind, element_bytes, body_bytes)


def is_whole(front: bytes, num_bytes: int) -> bool:
    """Whether what begins with `front`, FRONT_BYTES of it or all, is a chunk of `num_bytes` in all, encoded or not."""
    header = parse(front)
    if header is None:
        return False
    if num_bytes == HEADER_BYTES + header.payload_length:
        return True
    frame = parse_frame(front[HEADER_BYTES:])
    encoded = frame is not None and num_bytes == FRONT_BYTES + frame.body_bytes
    return encoded and num_bytes < HEADER_BYTES + header.payload_length
