"""How chunks are sealed where they are written and checked where they are read: by header, by checksum or by MAC.

Owns the order of the checks. Invariants: a chunk is OK only if its bytes were gone over after they had come, and, with
MACs, only if a process that has the cluster's secret wrote these bytes under this key, for this owner.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hmac import compare_digest
from typing import Literal, Protocol

import xxhash

from kvcore.trust.keys import KEY_ID_BYTES, ClusterKey, KeyLabel
from kvcore.trust.secrets import Secrets
from kvstore.chunk_format import (
    HEADER_BYTES,
    MAC_BYTES,
    NONCE_BYTES,
    ChunkHeader,
    Expected,
    checksum,
    header_outcome,
    parse,
)
from kvstore.integrity.mac import ChunkMac, owner_bytes
from kvstore.types import GetOutcome

Verify = Literal["header", "checksum", "mac"]
"""What is checked of a chunk that is read: its header alone, its checksum too, or its MAC."""


@dataclass(frozen=True, slots=True)
class Integrity:
    """How one process seals and checks chunks. `draw` gives so many random bytes. Raises ValueError for `mac` without
    `secrets`. May be used from any thread."""

    verify: Verify = "checksum"
    secrets: Secrets | None = None
    draw: Callable[[int], bytes] = os.urandom

    def __post_init__(self) -> None:
        if self.verify == "mac" and self.secrets is None:
            raise ValueError("there are no MACs without a secret")

    def sealing(self, header: ChunkHeader) -> "Sealing":
        """For a chunk that is about to be written, with the header that it will have but for what its bytes give."""
        return Sealing(self, header)

    def checking(self, expected: Expected) -> "Checking":
        """For a chunk that is about to be read."""
        return Checking(self, expected)

    def seal(self, header: ChunkHeader, payload: Sequence[memoryview]) -> ChunkHeader:
        """The header with what the payload's bytes give. Reads all of them; ValueError if they are not as many as it
        says."""
        sealing = self.sealing(header)
        for view in payload:
            sealing.show_payload(view)
        if (sealed := sealing.header()) is None:
            raise ValueError(f"the payload is not of {header.payload_length} bytes")
        return sealed

    def check(self, raw_header: bytes | memoryview, expected: Expected, payload: Sequence[memoryview]) -> GetOutcome:
        """Whether header and payload are the expected chunk. Reads every byte, if need be."""
        return self.checking(expected).outcome(raw_header, payload)

    def mac(self, header: ChunkHeader) -> ChunkMac | None:
        """To compute the MAC that the chunk should have; None if it has none, or one under a secret that is not
        accepted here."""
        if self.secrets is None or not any(header.key_id):
            return None
        secret = self.secrets.find(header.key_id)
        if secret is None and self.secrets.refresh():  # who wrote it has read a newer file
            secret = self.secrets.find(header.key_id)
        return None if secret is None else ChunkMac(_mac_key(secret, header), header)


def _mac_key(secret: ClusterKey, header: ChunkHeader) -> bytes:
    return secret.derive(KeyLabel.CHUNKS, b"mac" + owner_bytes(header))


class Sealing:
    """A chunk on its way out. Its bytes are shown once and in order: all with `show`, or the payload's alone."""

    def __init__(self, integrity: Integrity, header: ChunkHeader) -> None:
        self._header = replace(header, nonce=bytes(NONCE_BYTES), mac=bytes(MAC_BYTES), key_id=bytes(KEY_ID_BYTES))
        self._mac: ChunkMac | None = None
        if integrity.verify == "mac" and integrity.secrets is not None:
            secret = integrity.secrets.newest
            self._header = replace(self._header, nonce=integrity.draw(NONCE_BYTES), key_id=secret.id)
            self._mac = ChunkMac(_mac_key(secret, header), self._header)
        self._digest = xxhash.xxh3_64()
        self._skip = HEADER_BYTES
        self._left = header.payload_length

    def show(self, part: memoryview) -> None:
        """The next bytes of header and payload."""
        skipped = min(self._skip, part.nbytes)
        self._skip -= skipped
        self.show_payload(part[skipped:])

    def show_payload(self, part: memoryview) -> None:
        """The next bytes of the payload."""
        self._left -= part.nbytes
        self._digest.update(part)
        if self._mac is not None:
            self._mac.show(part)

    def header(self) -> ChunkHeader | None:
        """With checksum and MAC; None if not exactly the payload's bytes were shown. The last call."""
        if self._left:
            return None
        sealed = replace(self._header, checksum=int(self._digest.intdigest()))
        return sealed if self._mac is None else replace(sealed, mac=self._mac.tag())


class Checking:
    """A chunk on its way in. What is shown of it, once and in order, need not be gone over again."""

    def __init__(self, integrity: Integrity, expected: Expected) -> None:
        self._integrity = integrity
        self._expected = expected
        self._raw = bytearray()
        self._passed = 0
        self._proof: _Proof | None = None
        """Of what is shown; None: its header is not the expected chunk's, or has not come."""

    def show(self, part: memoryview) -> None:
        """The next bytes of header and payload."""
        if missing := HEADER_BYTES - len(self._raw):
            self._raw += part[:missing]
            part = part[missing:]
            if len(self._raw) == HEADER_BYTES:
                header = parse(self._raw)
                if header is not None and header_outcome(header, self._expected) is GetOutcome.OK:
                    self._proof = self._proof_of(header)
        self._passed += part.nbytes
        if self._proof is not None:
            self._proof.show(part)

    @property
    def done(self) -> bool:
        """Whether `outcome` need not go over the payload: all of it was shown, or nothing is checked of it."""
        shown = len(self._raw) == HEADER_BYTES and self._passed == self._expected.payload_length
        return shown or self._integrity.verify == "header"

    def outcome(self, raw_header: bytes | memoryview, payload: Sequence[memoryview]) -> GetOutcome:
        """Whether header and payload, both the reader's own copies, are the expected chunk. The last call."""
        header = parse(raw_header)
        if header is None or sum(view.nbytes for view in payload) != self._expected.payload_length:
            return GetOutcome.MALFORMED
        found = header_outcome(header, self._expected)
        if found is not GetOutcome.OK:
            return found
        proof = self._proof if self.done and bytes(self._raw) == bytes(raw_header) else None
        if proof is None:
            proof = self._proof_of(header)
            for view in payload:
                proof.show(view)
        return proof.outcome(payload)

    def _proof_of(self, header: ChunkHeader) -> "_Proof":
        if self._integrity.verify == "header":
            return _Nothing()
        if self._integrity.verify == "checksum":
            return _ByChecksum(header)
        return _ByMac(header, self._integrity.mac(header))


class _Proof(Protocol):
    def show(self, part: memoryview) -> None: ...

    def outcome(self, payload: Sequence[memoryview]) -> GetOutcome: ...


class _Nothing:
    """What the payload's bytes are changes nothing."""

    def show(self, part: memoryview) -> None:
        pass

    def outcome(self, payload: Sequence[memoryview]) -> GetOutcome:
        return GetOutcome.OK


class _ByChecksum:
    def __init__(self, header: ChunkHeader) -> None:
        self._expected = header.checksum
        self._digest = xxhash.xxh3_64()

    def show(self, part: memoryview) -> None:
        self._digest.update(part)

    def outcome(self, payload: Sequence[memoryview]) -> GetOutcome:
        return GetOutcome.OK if self._digest.intdigest() == self._expected else GetOutcome.CHECKSUM


class _ByMac:
    """`mac` None: there is none to hold it against."""

    def __init__(self, header: ChunkHeader, mac: ChunkMac | None) -> None:
        self._header, self._mac = header, mac

    def show(self, part: memoryview) -> None:
        if self._mac is not None:
            self._mac.show(part)

    def outcome(self, payload: Sequence[memoryview]) -> GetOutcome:
        """Where the MAC is wrong and the checksum right, somebody has computed that anew: damage does not."""
        if self._mac is not None and compare_digest(self._mac.tag(), self._header.mac):
            return GetOutcome.OK
        if checksum(payload) != self._header.checksum:
            return GetOutcome.CHECKSUM
        return GetOutcome.UNPROVEN if self._mac is None else GetOutcome.FORGED
