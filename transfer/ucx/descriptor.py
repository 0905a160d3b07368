"""`Segment.addresses["ucx"]`: all that a peer needs to reach a segment through UCX (docs/wire-formats.md). Pure."""

import base64
import binascii
import itertools
import struct
import zlib
from dataclasses import dataclass

from kvcore.errors import SegmentUnknownError, TransferProofError, TransferProtocolError
from kvcore.types import Segment

_MAGIC = b"KVFU"
_VERSION, _WITHHELD = 1, 2
_HEAD = struct.Struct("<4sHBBQQHHH")
_CRC = struct.Struct("<I")
_BASE = struct.Struct("<Q")
MAX_TEXT = 8192
"""Longest descriptor that is looked at; those of UCX 1.13 with TCP and one HCA have 400 to 1000 characters."""


@dataclass(frozen=True, slots=True)
class UcxDescriptor:
    """One segment: its owner's UCX (major, minor), memory, worker address and packed remote key."""

    ucx: tuple[int, int]
    segment_id: str
    size_bytes: int
    base: int
    worker_address: bytes
    rkey: bytes
    withheld: bool = False
    """`base` and `rkey` are told (`pack_place`) to who proves on its connection that it knows the cluster's secret."""


def pack_descriptor(descriptor: UcxDescriptor) -> str:
    """As text for `Segment.addresses`."""
    name = descriptor.segment_id.encode()
    head = _HEAD.pack(
        _MAGIC,
        _WITHHELD if descriptor.withheld else _VERSION,
        *descriptor.ucx,
        descriptor.size_bytes,
        descriptor.base,
        len(name),
        len(descriptor.worker_address),
        len(descriptor.rkey),
    )
    body = head + name + descriptor.worker_address + descriptor.rkey
    return base64.b64encode(body + _CRC.pack(zlib.crc32(body))).decode()


def parse_descriptor(text: str) -> UcxDescriptor:
    """Raises TransferProtocolError for anything but a whole descriptor of this version: UCX trusts what it is given."""
    if len(text) > MAX_TEXT:
        raise TransferProtocolError(f"a ucx descriptor of {len(text)} characters, at most {MAX_TEXT} are expected")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TransferProtocolError(f"a ucx descriptor that is not base64: {error}") from error
    if len(raw) < _HEAD.size + _CRC.size:
        raise TransferProtocolError(f"a ucx descriptor of {len(raw)} bytes is too short")
    magic, version, major, minor, size_bytes, base, *lengths = _HEAD.unpack_from(raw)
    if magic != _MAGIC or version not in (_VERSION, _WITHHELD):
        known = f"{_MAGIC!r} {_VERSION} and {_WITHHELD}"
        raise TransferProtocolError(f"a ucx descriptor of version {magic!r} {version}, known are {known}")
    body, crc = raw[: -_CRC.size], _CRC.unpack(raw[-_CRC.size :])[0]
    if len(body) != _HEAD.size + sum(lengths) or zlib.crc32(body) != crc:
        raise TransferProtocolError("a ucx descriptor with a wrong length or checksum")
    ends = [_HEAD.size + sum(lengths[:count]) for count in range(4)]
    name, address, rkey = (body[start:end] for start, end in itertools.pairwise(ends))
    withheld = version == _WITHHELD
    if withheld != (not rkey) or (withheld and base):
        raise TransferProtocolError("a ucx descriptor with a remote key that it should not have, or without one")
    return UcxDescriptor((major, minor), name.decode(errors="replace"), size_bytes, base, address, rkey, withheld)


def pack_place(base: int, rkey: bytes) -> bytes:
    """What a descriptor withholds."""
    return _BASE.pack(base) + rkey


def parse_place(place: bytes) -> tuple[int, bytes]:
    """Base and remote key. Raises TransferProtocolError."""
    if len(place) <= _BASE.size:
        raise TransferProtocolError(f"a place of {len(place)} bytes is too short")
    return _BASE.unpack_from(place)[0], place[_BASE.size :]


def descriptor_of(segment: Segment, ucx: tuple[int, int], *, proven: bool = False) -> UcxDescriptor:
    """The segment's descriptor, checked against what else is known of it and against our own UCX. `proven`: we have a
    secret, and want a host that asks for a proof of it."""
    found = parse_descriptor(segment.addresses.get("ucx", ""))
    if (found.segment_id, found.size_bytes) != (segment.id, segment.size_bytes):
        raise SegmentUnknownError(
            f"wanted segment {segment.id} of {segment.size_bytes} bytes, its descriptor is for {found.segment_id} "
            f"of {found.size_bytes}"
        )
    if found.withheld != proven:
        raise TransferProofError(
            f"segment {segment.id}: its node "
            + ("tells where it lies without a proof" if proven else "wants a proof of its cluster's secret")
        )
    if found.ucx != ucx:
        raise TransferProtocolError(
            f"segment {segment.id}: its node runs UCX {found.ucx[0]}.{found.ucx[1]}, this one {ucx[0]}.{ucx[1]}; "
            "give all nodes the same"
        )
    return found
