"""Encryption of one chunk's payload: AES-256-GCM as the bytes pass, with what its header says of it beside them.

Layout: docs/wire-formats.md, "An encrypted chunk in a segment". Pure. Each chunk's name has a key of its own, so a
nonce must not repeat among the writes of one chunk alone; docs/adr/0016 says why it does not.
"""

from collections.abc import Sequence

import xxhash
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from kvcore.trust.keys import ClusterKey, KeyLabel
from kvstore.chunk_format import ChunkHeader
from kvstore.integrity.mac import identity, owner_bytes

_PART_BYTES = 256 << 10
"""What was encrypted is hashed while it is in the processor's nearest cache."""


def chunk_key(secret: ClusterKey, header: ChunkHeader) -> bytes:
    """32 bytes, for this chunk alone: of its tenant's key and of its name."""
    tenant = secret.mac_key(KeyLabel.CHUNKS, b"encrypt chunk" + owner_bytes(header))
    return tenant.digest(header.key + header.fingerprint)


class Encryption:
    """Of one chunk with that header, under a `key` of 32 bytes and the header's nonce."""

    def __init__(self, key: bytes, header: ChunkHeader) -> None:
        assert header.encrypted
        self._cipher = Cipher(AES(key), GCM(header.nonce)).encryptor()
        self._cipher.authenticate_additional_data(identity(header))
        self._digest = xxhash.xxh3_64()

    def take(self, part: memoryview, into: memoryview) -> None:
        """The next bytes of the payload; fills as many of `into`. Either of flat bytes; they may be the same."""
        for start in range(0, part.nbytes, _PART_BYTES):
            made = into[start : min(start + _PART_BYTES, part.nbytes)]
            self._cipher.update_into(part[start : start + _PART_BYTES], made)
            self._digest.update(made)

    def end(self) -> tuple[bytes, int]:
        """The tag of 16 bytes, and the checksum of what was made. The last call."""
        self._cipher.finalize()
        return bytes(self._cipher.tag), int(self._digest.intdigest())


class Decryption:
    """Of one chunk with that header. Nothing that it gave may be used before `is_right`."""

    def __init__(self, key: bytes, header: ChunkHeader) -> None:
        assert header.encrypted
        self._key, self._header = key, header
        self._cipher = Cipher(AES(key), GCM(header.nonce)).decryptor()
        self._cipher.authenticate_additional_data(identity(header))
        self._scratch = memoryview(b"")

    def open(self, part: memoryview) -> None:
        """The next bytes of the payload, flat and writable: decrypted where they are."""
        for start in range(0, part.nbytes, _PART_BYTES):
            one = part[start : start + _PART_BYTES]
            self._cipher.update_into(one, one)

    def look(self, part: memoryview) -> None:
        """The next bytes of the payload, which stay as they are."""
        if not self._scratch:
            self._scratch = memoryview(bytearray(_PART_BYTES))
        for start in range(0, part.nbytes, _PART_BYTES):
            one = part[start : start + _PART_BYTES]
            self._cipher.update_into(one, self._scratch[: one.nbytes])

    def is_right(self) -> bool:
        """Whether who has the key wrote all of it, for this name and owner. The last call but for `close_again`."""
        try:
            self._cipher.finalize_with_tag(self._header.mac)
        except InvalidTag:
            return False
        return True

    def close_again(self, payload: Sequence[memoryview]) -> None:
        """Undo what `open` did to the whole payload: so what lay there can be looked at."""
        cipher = Cipher(AES(self._key), GCM(self._header.nonce)).encryptor()
        for view in payload:
            for start in range(0, view.nbytes, _PART_BYTES):
                one = view[start : start + _PART_BYTES]
                cipher.update_into(one, one)
