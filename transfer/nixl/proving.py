"""Messages of a NIXL connection's greeting in a cluster with a secret (docs/wire-formats.md). Pure.

    HELLO  the asking agent's metadata, vouched for -->    <-- CHALLENGE
    PROOF -->    <-- PLACE  where the segment lies, and the metadata with its remote keys, sealed

NIXL trusts metadata that it is given: a host gives it none that nobody with the secret has made.
"""

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from kvcore.errors import TransferProofError, TransferProtocolError
from transfer.greeting import GreetingKey
from transfer.nixl.descriptor import MAX_HELLO, opened, sealed

MAGIC = b"KVFS"
_HEAD = struct.Struct("<4sHQBHH")
_BASE = struct.Struct("<Q")
_VERSION = 1
_VOUCHER_BYTES = 32


class GreetingStep(IntEnum):
    """What a message is; the initiator sends HELLO and PROOF."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    PLACE = 4


@dataclass(frozen=True, slots=True)
class NixlStep:
    """`nonce`: chosen by the initiator, the same in all messages of a greeting. `metadata`: of a HELLO alone."""

    step: GreetingStep
    nonce: int
    body: bytes
    metadata: bytes = b""


def pack_step(message: NixlStep) -> bytes:
    """As a notification's payload."""
    lengths = len(message.body), len(message.metadata)
    head = _HEAD.pack(MAGIC, _VERSION, message.nonce, message.step, *lengths)
    return sealed(head + message.body + message.metadata)


def parse_step(raw: bytes) -> NixlStep:
    """Raises TransferProtocolError."""
    if len(raw) > MAX_HELLO:
        raise TransferProtocolError(f"a greeting of {len(raw)} bytes, at most {MAX_HELLO} are expected")
    (nonce, number), body, metadata = opened(raw, _HEAD, MAGIC, "greeting")
    if number not in list(GreetingStep):
        raise TransferProtocolError(f"a greeting's message of kind {number}")
    return NixlStep(GreetingStep(number), nonce, body, metadata)


def pack_place(base: int, metadata: bytes) -> bytes:
    """What a descriptor withholds."""
    return _BASE.pack(base) + metadata


def parse_place(place: bytes) -> tuple[int, bytes]:
    """Base and metadata. Raises TransferProtocolError."""
    if len(place) <= _BASE.size:
        raise TransferProtocolError(f"a place of {len(place)} bytes is too short")
    return _BASE.unpack_from(place)[0], place[_BASE.size :]


def vouched(keys: Sequence[GreetingKey], hello: bytes, metadata: bytes) -> bytes:
    """The body of a HELLO: how many secrets, for each of them an HMAC over `hello` and metadata, then `hello`."""
    return bytes([len(keys)]) + b"".join(_voucher(key, hello, metadata) for key in keys) + hello


def check_voucher(keys: Sequence[GreetingKey], body: bytes, metadata: bytes) -> bytes:
    """The hello in it. Raises TransferProofError unless a process with one of our secrets has made it."""
    end = 1 + body[0] * _VOUCHER_BYTES if body else 0
    vouchers, hello = body[1:end], body[end:]
    for key in keys:
        wanted = _voucher(key, hello, metadata)
        for at in range(0, len(vouchers), _VOUCHER_BYTES):
            if hmac.compare_digest(wanted, vouchers[at : at + _VOUCHER_BYTES]):
                return hello
    raise TransferProofError("a greeting that nobody with this cluster's secret has made")


def _voucher(key: GreetingKey, hello: bytes, metadata: bytes) -> bytes:
    return hmac.digest(key.made_by, b"metadata\0" + hello + metadata, "sha256")
