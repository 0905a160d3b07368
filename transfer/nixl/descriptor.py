"""`Segment.addresses["nixl"]`, and the greeting of a new connection (docs/wire-formats.md). Pure.

NIXL trusts the metadata that it is given, so nothing of a descriptor or a greeting reaches it before all of it was
checked.
"""

import base64
import binascii
import itertools
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from kvcore.errors import SegmentUnknownError, TransferProofError, TransferProtocolError
from kvcore.types import Segment

_DESCRIPTOR, _HELLO, _WELCOME = b"KVFN", b"KVFH", b"KVFW"
_VERSION, _WITHHELD = 1, 2
_HEAD = struct.Struct("<4sH3B2BxQQHH")
_HELLO_HEAD = struct.Struct("<4sHQHH")
_WELCOME_BODY = struct.Struct("<4sHQB")
_CRC = struct.Struct("<I")
MAX_TEXT = 16384
"""Longest descriptor that is looked at; those of NIXL 1.5 with one device have about 500 characters."""
MAX_HELLO = 8192


@dataclass(frozen=True, slots=True)
class Versions:
    """NIXL's (major, minor, patch) and that of the UCX inside of it (major, minor)."""

    nixl: tuple[int, int, int]
    ucx: tuple[int, int]

    def __str__(self) -> str:
        return f"NIXL {'.'.join(map(str, self.nixl))} with UCX {'.'.join(map(str, self.ucx))}"

    def understands(self, other: "Versions") -> bool:
        """Whether both read each other's metadata: patches of one NIXL do, worker addresses of two UCX do not."""
        return (self.nixl[:2], self.ucx) == (other.nixl[:2], other.ucx)


@dataclass(frozen=True, slots=True)
class NixlDescriptor:
    """One segment: its owner's versions, memory, and its agent's metadata (addresses and remote keys)."""

    versions: Versions
    segment_id: str
    size_bytes: int
    base: int
    metadata: bytes
    withheld: bool = False
    """`base`, and what the metadata says of memory, are told to who proves on its connection that it knows the
    cluster's secret (`transfer.nixl.proving`)."""


@dataclass(frozen=True, slots=True)
class NixlHello:
    """An initiator asks whether a segment is here; `metadata` of its agent, without memory, is for the answer."""

    nonce: int
    segment_id: str
    metadata: bytes


class HelloAnswer(IntEnum):
    """What a host says to a hello."""

    UNKNOWN = 0
    WELCOME = 1
    FULL = 2


@dataclass(frozen=True, slots=True)
class NixlWelcome:
    """The answer to the hello with the same nonce."""

    nonce: int
    answer: HelloAnswer


def pack_descriptor(descriptor: NixlDescriptor) -> str:
    """As text for `Segment.addresses`."""
    name = descriptor.segment_id.encode()
    head = _HEAD.pack(
        _DESCRIPTOR,
        _WITHHELD if descriptor.withheld else _VERSION,
        *descriptor.versions.nixl,
        *descriptor.versions.ucx,
        descriptor.size_bytes,
        descriptor.base,
        len(name),
        len(descriptor.metadata),
    )
    return base64.b64encode(sealed(head + name + descriptor.metadata)).decode()


def parse_descriptor(text: str) -> NixlDescriptor:
    """Raises TransferProtocolError for anything but a whole descriptor of this version."""
    if len(text) > MAX_TEXT:
        raise TransferProtocolError(f"a nixl descriptor of {len(text)} characters, at most {MAX_TEXT} are expected")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TransferProtocolError(f"a nixl descriptor that is not base64: {error}") from error
    withheld = raw[len(_DESCRIPTOR) : len(_DESCRIPTOR) + 2] == _WITHHELD.to_bytes(2, "little")
    version = _WITHHELD if withheld else _VERSION
    head, name, metadata = opened(raw, _HEAD, _DESCRIPTOR, "nixl descriptor", version)
    *versions, size_bytes, base = head
    return NixlDescriptor(
        Versions((versions[0], versions[1], versions[2]), (versions[3], versions[4])),
        name.decode(errors="replace"),
        size_bytes,
        base,
        metadata,
        withheld,
    )


def descriptor_of(segment: Segment, versions: Versions, *, proven: bool = False) -> NixlDescriptor:
    """The segment's descriptor, checked against what else is known of it and against our own versions. `proven`: we
    have a secret, and want a host that asks for a proof of it."""
    found = parse_descriptor(segment.addresses.get("nixl", ""))
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
    if not versions.understands(found.versions):
        raise TransferProtocolError(
            f"segment {segment.id}: its node runs {found.versions}, this one {versions}; give all nodes the same"
        )
    return found


def pack_hello(hello: NixlHello) -> bytes:
    """As a notification's payload."""
    name = hello.segment_id.encode()
    head = _HELLO_HEAD.pack(_HELLO, _VERSION, hello.nonce, len(name), len(hello.metadata))
    return sealed(head + name + hello.metadata)


def parse_hello(raw: bytes) -> NixlHello:
    """Raises TransferProtocolError."""
    if len(raw) > MAX_HELLO:
        raise TransferProtocolError(f"a greeting of {len(raw)} bytes, at most {MAX_HELLO} are expected")
    (nonce,), name, metadata = opened(raw, _HELLO_HEAD, _HELLO, "greeting")
    return NixlHello(nonce, name.decode(errors="replace"), metadata)


def pack_welcome(welcome: NixlWelcome) -> bytes:
    """As a notification's payload."""
    return sealed(_WELCOME_BODY.pack(_WELCOME, _VERSION, welcome.nonce, welcome.answer))


def parse_welcome(raw: bytes) -> NixlWelcome:
    """Raises TransferProtocolError."""
    if len(raw) != _WELCOME_BODY.size + _CRC.size:
        raise TransferProtocolError(f"an answer to a greeting of {len(raw)} bytes")
    body = _unsealed(raw, "answer to a greeting")
    magic, version, nonce, answer = _WELCOME_BODY.unpack(body)
    if (magic, version) != (_WELCOME, _VERSION) or answer not in list(HelloAnswer):
        raise TransferProtocolError(f"an answer to a greeting that is {magic!r} {version} {answer}")
    return NixlWelcome(nonce, HelloAnswer(answer))


def sealed(body: bytes) -> bytes:
    """With its checksum behind it."""
    return body + _CRC.pack(zlib.crc32(body))


def _unsealed(raw: bytes, what: str) -> bytes:
    body, crc = raw[: -_CRC.size], _CRC.unpack(raw[-_CRC.size :])[0]
    if zlib.crc32(body) != crc:
        raise TransferProtocolError(f"a {what} with a wrong checksum")
    return body


def opened(
    raw: bytes, head: struct.Struct, magic: bytes, what: str, wanted: int = _VERSION
) -> tuple[list[int], bytes, bytes]:
    """A struct that ends in two lengths, and the two parts that follow. Checks everything but the fields between."""
    if len(raw) < head.size + _CRC.size:
        raise TransferProtocolError(f"a {what} of {len(raw)} bytes is too short")
    found, version, *fields, first, second = head.unpack_from(raw)
    if (found, version) != (magic, wanted):
        raise TransferProtocolError(f"a {what} of version {found!r} {version}, known is {magic!r} {wanted}")
    body = _unsealed(raw, what)
    ends = list(itertools.accumulate((head.size, first, second)))
    if len(body) != ends[-1]:
        raise TransferProtocolError(f"a {what} with a wrong length")
    return fields, body[ends[0] : ends[1]], body[ends[1] : ends[2]]
