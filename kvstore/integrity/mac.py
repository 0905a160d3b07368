"""The MAC of one chunk: AES-256-GMAC over what its header says of it, then over its payload, as the bytes pass.

Layout: docs/wire-formats.md, "The MAC of a chunk". Pure. The generation is not among what it is over, nor the checksum:
a chunk that is copied, moved or promoted gets another generation from who holds no key, and is the same chunk.
"""

import struct
from collections.abc import Sequence

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from kvcore.chunk_keys import OWNER_BYTES
from kvstore.chunk_format import HEADER_BYTES, VERSION, ChunkHeader

PART_BYTES = 1 << 20
"""Nothing else runs in Python while a part is computed: 0.05 ms."""

_IDENTITY = struct.Struct(f"<HHI16s16sQ{OWNER_BYTES}s8x")
_NO_OWNER = bytes(OWNER_BYTES)


def identity(header: ChunkHeader) -> bytes:
    """64 bytes: which chunk it is, and whose; nothing of where it lies."""
    return _IDENTITY.pack(
        VERSION,
        HEADER_BYTES,
        header.token_count,
        header.key,
        header.fingerprint,
        header.payload_length,
        owner_bytes(header),
    )


def owner_bytes(header: ChunkHeader) -> bytes:
    """Zeros where it is not known."""
    return header.owner or _NO_OWNER


class ChunkMac:
    """The MAC of `header`'s chunk under a `key` of 32 bytes, with the header's nonce, which no other chunk may have had
    under that key."""

    def __init__(self, key: bytes, header: ChunkHeader) -> None:
        self._gmac = Cipher(AES(key), GCM(header.nonce)).encryptor()
        self._gmac.authenticate_additional_data(identity(header))

    def show(self, part: memoryview) -> None:
        """The next bytes of the payload."""
        for start in range(0, part.nbytes, PART_BYTES):
            self._gmac.authenticate_additional_data(part[start : start + PART_BYTES])

    def tag(self) -> bytes:
        """16 bytes. The last call."""
        self._gmac.finalize()
        return bytes(self._gmac.tag)


def mac_of(key: bytes, header: ChunkHeader, payload: Sequence[memoryview]) -> bytes:
    """The MAC of a chunk whose bytes are there already."""
    mac = ChunkMac(key, header)
    for view in payload:
        mac.show(view)
    return mac.tag()
