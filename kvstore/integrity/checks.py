"""How chunks are sealed where they are written and checked where they are read: by header, by checksum or by MAC; and
where they are encrypted, how they are opened.

Owns the order of the checks. Invariants: a chunk is OK only if its bytes were gone over after they had come, and, with
MACs or encrypted, only if a process that has the cluster's secret wrote these bytes under this key, for this owner.
Encrypted bytes are never OK where they were not opened, nor are plain ones where all are encrypted.
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
from kvstore.integrity.cipher import Decryption, Encryption, chunk_key
from kvstore.integrity.mac import ChunkMac, owner_bytes
from kvstore.types import GetOutcome

Verify = Literal["header", "checksum", "mac"]
"""What is checked of a chunk that is read: its header alone, its checksum too, or its MAC."""


@dataclass(frozen=True, slots=True)
class Integrity:
    """How one process seals and checks chunks. `draw` gives so many random bytes. `encrypt`: all that it writes and
    takes is. Raises ValueError for `mac` without `secrets`, and for `encrypt` without `mac`. May be used from any
    thread."""

    verify: Verify = "checksum"
    secrets: Secrets | None = None
    draw: Callable[[int], bytes] = os.urandom
    encrypt: bool = False

    def __post_init__(self) -> None:
        if self.verify == "mac" and self.secrets is None:
            raise ValueError("there are no MACs without a secret")
        if self.encrypt and self.verify != "mac":
            raise ValueError("what is encrypted is always proved too")

    def sealing(self, header: ChunkHeader) -> "Sealing":
        """For a chunk that is about to be written, with the header that it will have but for what its bytes give."""
        return Sealing(self, header)

    def checking(self, expected: Expected) -> "Checking":
        """For a chunk that is about to be read; it is opened where it comes to lie."""
        return Checking(self, expected)

    def encrypted(self, header: ChunkHeader, payload: Sequence[memoryview], into: memoryview) -> ChunkHeader:
        """Fill `into`, flat bytes, with the payload encrypted; the header that goes with it. The nonce is drawn anew.
        Raises ValueError where `payload` or `into` is not of as many bytes as the header says."""
        if not sum(view.nbytes for view in payload) == into.nbytes == header.payload_length:
            raise ValueError(f"the payload is not of {header.payload_length} bytes")
        assert self.secrets is not None, "a cluster file that asks for encryption has a secret"
        secret = self.secrets.newest
        nonce = self.draw(NONCE_BYTES)
        header = replace(header, encrypted=True, nonce=nonce, mac=bytes(MAC_BYTES), key_id=secret.id)
        encryption, at = Encryption(chunk_key(secret, header), header), 0
        for view in flat(payload):
            encryption.take(view, into[at : at + view.nbytes])
            at += view.nbytes
        tag, found = encryption.end()
        return replace(header, mac=tag, checksum=found)

    def seal(self, header: ChunkHeader, payload: Sequence[memoryview]) -> ChunkHeader:
        """The header with what the payload's bytes, which stay as they are, give. Reads all of them; ValueError if they
        are not as many as it says."""
        sealing = self.sealing(header)
        for view in payload:
            sealing.show_payload(view)
        if (sealed := sealing.header()) is None:
            raise ValueError(f"the payload is not of {header.payload_length} bytes")
        return sealed

    def check(self, raw_header: bytes | memoryview, expected: Expected, payload: Sequence[memoryview]) -> GetOutcome:
        """Whether header and payload are the expected chunk. Reads every byte, if need be, and changes none: what is
        encrypted stays so."""
        return Checking(self, expected, opens=False).outcome(raw_header, payload)

    def open(self, header: ChunkHeader, payload: memoryview, into: memoryview) -> bool:
        """Fill `into` with an encrypted chunk's payload as it was; both are flat. False: it was changed, is another
        chunk's, or under a secret that is not accepted here, and what is in `into` means nothing."""
        if (found := self.decryption(header)) is None:
            return False
        into[:] = payload
        found.open(into)
        return found.is_right()

    def mac(self, header: ChunkHeader) -> ChunkMac | None:
        """To compute the MAC that the chunk should have; None if it has none, or one under a secret that is not
        accepted here."""
        secret = None if header.encrypted else self._secret_of(header)
        return None if secret is None else ChunkMac(_mac_key(secret, header), header)

    def decryption(self, header: ChunkHeader) -> Decryption | None:
        """To open the chunk; None if it is not encrypted, or under a secret that is not accepted here."""
        secret = self._secret_of(header) if header.encrypted else None
        return None if secret is None else Decryption(chunk_key(secret, header), header)

    def _secret_of(self, header: ChunkHeader) -> ClusterKey | None:
        return self.secret_of(header.key_id) if any(header.key_id) else None

    def secret_of(self, key_id: bytes) -> ClusterKey | None:
        """The secret by which a chunk was written; None: it is not accepted here, or there is none."""
        if self.secrets is None:
            return None
        secret = self.secrets.find(key_id)
        if secret is None and self.secrets.refresh():  # who wrote it has read a newer file
            secret = self.secrets.find(key_id)
        return secret


def _mac_key(secret: ClusterKey, header: ChunkHeader) -> bytes:
    return secret.derive(KeyLabel.CHUNKS, b"mac" + owner_bytes(header))


class Sealing:
    """A chunk on its way out. Its bytes are shown once and in order: all with `show`, or the payload's alone."""

    def __init__(self, integrity: Integrity, header: ChunkHeader) -> None:
        self._header = replace(
            header, nonce=bytes(NONCE_BYTES), mac=bytes(MAC_BYTES), key_id=bytes(KEY_ID_BYTES), encrypted=False
        )
        self._mac: ChunkMac | None = None
        if integrity.verify == "mac" and integrity.secrets is not None:
            secret = integrity.secrets.newest
            self._header = replace(self._header, nonce=integrity.draw(NONCE_BYTES), key_id=secret.id)
            self._mac = ChunkMac(_mac_key(secret, self._header), self._header)
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
    """A chunk on its way in. What is shown of it, once and in order, need not be gone over again. `opens`: if it is
    encrypted it is decrypted where it is shown, or else where `outcome` finds it."""

    def __init__(self, integrity: Integrity, expected: Expected, *, opens: bool = True) -> None:
        self._integrity = integrity
        self._expected = expected
        self._opens = opens
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
        # The payload is in one of four states:
        # 1. all of it was shown under this header, or nothing is checked of it: it was gone over;
        # 2. some of it was opened under this header: the rest is not, and none is to be opened twice;
        # 3. some was opened under another header: nobody can say what lay there;
        # 4. otherwise it is as it came: it is gone over now.
        payload, same = flat(payload), bytes(self._raw) == bytes(raw_header)
        proof = self._proof if same and (self.done or isinstance(self._proof, _ByTag)) else None
        if proof is None and isinstance(self._proof, _ByTag):
            return GetOutcome.CHECKSUM
        start = self._passed
        if proof is None:
            proof, start = self._proof_of(header), 0
        for view in payload:
            if start < view.nbytes:
                proof.show(view[start:] if start else view)
            start = max(0, start - view.nbytes)
        return proof.outcome(payload)

    def _proof_of(self, header: ChunkHeader) -> "_Proof":
        if self._integrity.encrypt and (decryption := self._integrity.decryption(header)) is not None:
            return _ByTag(header, decryption, opens=self._opens)
        if header.encrypted or self._integrity.encrypt:
            return _ByMac(header, self._integrity.mac(header), proves=False)
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
    """`mac` None: there is none to hold it against. `proves`: a right one is enough."""

    def __init__(self, header: ChunkHeader, mac: ChunkMac | None, *, proves: bool = True) -> None:
        self._header, self._mac, self._proves = header, mac, proves

    def show(self, part: memoryview) -> None:
        if self._mac is not None:
            self._mac.show(part)

    def outcome(self, payload: Sequence[memoryview]) -> GetOutcome:
        """Where the MAC is wrong and the checksum right, somebody has computed that anew: damage does not."""
        if self._mac is not None and compare_digest(self._mac.tag(), self._header.mac):
            return GetOutcome.OK if self._proves else GetOutcome.UNPROVEN
        if checksum(payload) != self._header.checksum:
            return GetOutcome.CHECKSUM
        return GetOutcome.UNPROVEN if self._mac is None else GetOutcome.FORGED


class _ByTag:
    """Of an encrypted chunk. `opens`: the payload is decrypted where it is."""

    def __init__(self, header: ChunkHeader, decryption: Decryption, *, opens: bool) -> None:
        self._header, self._decryption, self._opens = header, decryption, opens
        self._step = decryption.open if opens else decryption.look

    def show(self, part: memoryview) -> None:
        self._step(part)

    def outcome(self, payload: Sequence[memoryview]) -> GetOutcome:
        """As with a MAC. The checksum is of what was encrypted, so that is brought back to be looked at."""
        if self._decryption.is_right():
            return GetOutcome.OK
        if self._opens:
            self._decryption.close_again(payload)
        return GetOutcome.FORGED if checksum(payload) == self._header.checksum else GetOutcome.CHECKSUM


def flat(views: Sequence[memoryview]) -> list[memoryview]:
    """The same memory as flat bytes."""
    return [view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in views if view.nbytes]
