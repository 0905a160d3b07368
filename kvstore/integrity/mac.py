"""The MAC of one chunk: AES-256-GMAC over what its header says of it, then over its payload, as the bytes pass.

Layout: docs/wire-formats.md, "The MAC of a chunk". Pure. The generation is not among what it is over, nor the checksum:
a chunk that is copied, moved or promoted gets another generation from who holds no key, and is the same chunk.
"""

import struct
from collections.abc import Sequence

from kvcore.chunk_keys import OWNER_BYTES
from kvcore.trust.gmac import Gmac
from kvstore.chunk_format import ENCRYPTED, HEADER_BYTES, VERSION, ChunkHeader

_IDENTITY = struct.Struct(f"<HHI16s16sQ{OWNER_BYTES}s8x")
_NO_OWNER = bytes(OWNER_BYTES)


def identity(header: ChunkHeader) -> bytes:
    """64 bytes: which chunk it is, and whose; nothing of where it lies."""
    return _IDENTITY.pack(
        ENCRYPTED if header.encrypted else VERSION,
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
        self._gmac = Gmac(key, header.nonce)
        self._gmac.show(identity(header))

    def show(self, part: memoryview) -> None:
        """The next bytes of the payload."""
        self._gmac.show(part)

    def tag(self) -> bytes:
        """16 bytes. The last call."""
        return self._gmac.tag()


def mac_of(key: bytes, header: ChunkHeader, payload: Sequence[memoryview]) -> bytes:
    """The MAC of a chunk whose bytes are there already."""
    mac = ChunkMac(key, header)
    for view in payload:
        mac.show(view)
    return mac.tag()
