"""Frames of the TCP transport (docs/wire-formats.md, "Transfer over TCP"), packed and parsed with every field checked.

A frame is a 32-byte header, `count` table entries of 16 bytes (WRITE and READ only) and `payload_bytes` bytes. Pure.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import chain
from zlib import crc32

import msgspec

from kvcore.errors import (
    SegmentUnknownError,
    TransferError,
    TransferForgedError,
    TransferProofError,
    TransferProtocolError,
)

MAGIC = b"KVFT"
VERSION = 1
MAX_OPS = 4096
"""Table entries in one frame: 64 KiB of table."""
MAX_TEXT_BYTES = 1024
"""Of a HELLO's, WELCOME's or ERROR's payload."""

_FIELDS = struct.Struct("<4sHBBIIQI")
_CRC = struct.Struct("<I")
_ENTRY = struct.Struct("<QQ")
HEADER_BYTES = _FIELDS.size + _CRC.size
ENTRY_BYTES = _ENTRY.size


class FrameKind(IntEnum):
    """What a frame says. The initiator sends the HELLOs, WRITE, READ and PROOF; the target the others."""

    HELLO = 1
    WELCOME = 2
    WRITE = 3
    READ = 4
    WRITTEN = 5
    DATA = 6
    ERROR = 7
    PROVEN_HELLO = 8
    CHALLENGE = 9
    PROOF = 10
    SEALED_HELLO = 11


GREETED = {FrameKind.PROVEN_HELLO: "tcp", FrameKind.SEALED_HELLO: "tcp+frames"}
"""What is proved, by the frame that begins it: who takes one for the other finds the proof wrong."""

_KINDS = {int(kind): kind for kind in FrameKind}


class ErrorCode(IntEnum):
    """`count` of an ERROR frame."""

    PROTOCOL = 1
    SEGMENT_UNKNOWN = 2
    PROOF = 3
    FORGED = 4


_CODES: dict[type[TransferError], ErrorCode] = {
    SegmentUnknownError: ErrorCode.SEGMENT_UNKNOWN,
    TransferForgedError: ErrorCode.FORGED,
    TransferProofError: ErrorCode.PROOF,
}


class Header(msgspec.Struct, frozen=True):
    """The fixed part of a frame."""

    kind: FrameKind
    count: int = 0
    table_crc: int = 0
    payload_bytes: int = 0
    request_id: int = 0


def pack_header(header: Header) -> bytes:
    """32 bytes."""
    fields = _FIELDS.pack(
        MAGIC,
        VERSION,
        header.kind,
        0,
        header.count,
        header.table_crc,
        header.payload_bytes,
        header.request_id,
    )
    return fields + _CRC.pack(crc32(fields))


def parse_header(raw: bytes | bytearray) -> Header:
    """Raises TransferProtocolError for anything that `pack_header` does not make."""
    if len(raw) != HEADER_BYTES:
        raise TransferProtocolError(f"a frame header has {HEADER_BYTES} bytes, got {len(raw)}")
    magic, version, number, flags, count, table_crc, payload_bytes, request_id = _FIELDS.unpack_from(raw)
    if magic != MAGIC:
        raise TransferProtocolError(f"not a kvferry transfer peer: it began with {bytes(magic)!r}")
    if version != VERSION:
        raise TransferProtocolError(f"the peer speaks version {version} of the transfer protocol, this is {VERSION}")
    if _CRC.unpack_from(raw, _FIELDS.size)[0] != crc32(raw[: _FIELDS.size]):
        raise TransferProtocolError("the frame header's checksum is wrong")
    kind = _KINDS.get(number)
    if flags != 0 or kind is None:
        raise TransferProtocolError(f"unknown frame kind {number} or flags {flags:#x}")
    return Header(kind, count, table_crc, payload_bytes, request_id)


def pack_request(kind: FrameKind, ranges: Sequence[tuple[int, int]], request_id: int) -> bytes:
    """Header and table of a WRITE or READ of `(offset, length)` ranges, at most MAX_OPS and each not empty."""
    table = struct.pack(f"<{2 * len(ranges)}Q", *chain.from_iterable(ranges))
    total = sum(length for _, length in ranges)
    return pack_header(Header(kind, len(ranges), crc32(table), total, request_id)) + table


def check_request(header: Header) -> None:
    """Raises TransferProtocolError unless it is a WRITE or READ whose table has a permitted length."""
    if header.kind not in (FrameKind.WRITE, FrameKind.READ) or not 0 < header.count <= MAX_OPS:
        raise TransferProtocolError(f"a {header.kind.name} frame with {header.count} ranges is no request")


def parse_table(header: Header, table: bytes | bytearray, size_bytes: int) -> list[tuple[int, int]]:
    """The `(offset, length)` ranges, each not empty and inside of `[0, size_bytes)`.

    Raises TransferProtocolError for a table that contradicts its header, SegmentUnknownError for a range outside.
    """
    if len(table) != header.count * ENTRY_BYTES or crc32(table) != header.table_crc:
        raise TransferProtocolError("the table's length or checksum is wrong")
    ranges: list[tuple[int, int]] = list(_ENTRY.iter_unpack(table))
    if sum(length for _, length in ranges) != header.payload_bytes:
        raise TransferProtocolError("the table's lengths do not add up to the payload")
    for offset, length in ranges:
        if length == 0 or offset + length > size_bytes:
            raise SegmentUnknownError(f"range [{offset}, {offset + length}) is empty or outside of [0, {size_bytes})")
    return ranges


def pack_hello(segment_id: str) -> bytes:
    """The first frame of a connection: which segment all later ones mean."""
    text = segment_id.encode()
    return pack_header(Header(FrameKind.HELLO, payload_bytes=len(text))) + text


def pack_greeting(kind: FrameKind, payload: bytes) -> bytes:
    """A PROVEN_HELLO, SEALED_HELLO, CHALLENGE or PROOF; `transfer.greeting` makes what is in it."""
    return pack_header(Header(kind, payload_bytes=len(payload))) + payload


def pack_welcome(segment_id: str, size_bytes: int) -> bytes:
    """The target's answer: the segment that it hosts."""
    payload = size_bytes.to_bytes(8, "little") + segment_id.encode()
    return pack_header(Header(FrameKind.WELCOME, payload_bytes=len(payload))) + payload


def check_text(header: Header, kind: FrameKind) -> None:
    """Raises TransferProtocolError unless the frame is of `kind` and its payload within MAX_TEXT_BYTES."""
    if header.kind != kind or header.payload_bytes > MAX_TEXT_BYTES:
        raise TransferProtocolError(
            f"expected a {kind.name} frame of at most {MAX_TEXT_BYTES} bytes, "
            f"got {header.kind.name} with {header.payload_bytes}"
        )


def error_text_bytes(header: Header) -> int:
    """Length of the text that follows an ERROR frame's header. Raises TransferProtocolError unless it is one."""
    check_text(header, FrameKind.ERROR)
    return header.payload_bytes


def check_reply(header: Header, wanted: Header) -> None:
    """Raises TransferProtocolError unless the frame is the one that answers a request."""
    if header != wanted:
        raise TransferProtocolError(f"expected {wanted}, the peer sent {header}")


def pack_error(error: TransferError) -> bytes:
    """What a target says before it closes the connection."""
    text = error.message.encode()[:MAX_TEXT_BYTES]
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), ErrorCode.PROTOCOL)
    return pack_header(Header(FrameKind.ERROR, count=code, payload_bytes=len(text))) + text


def parse_error(header: Header, text: bytes | bytearray) -> TransferError:
    """The error that an ERROR frame stands for."""
    message = f"the peer said: {text.decode(errors='replace')}"
    kind = next((kind for kind, code in _CODES.items() if code == header.count), TransferProtocolError)
    return kind(message)
