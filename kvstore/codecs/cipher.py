"""Encrypts chunks for a tier: AES-256-GCM under a key of their tenant, as a last step behind whatever codec there is.

Layout: docs/wire-formats.md, "An encrypted chunk". Pure but for the nonce. The header stays readable, as tiers look
chunks up by it, but for the checksum: who has a guess at a prompt could compute that one and compare.
"""

from dataclasses import replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from kvcore.trust.gmac import PART_BYTES
from kvcore.trust.keys import ClusterKey, KeyLabel
from kvstore.chunk_format import HEADER_BYTES, NONCE_BYTES, ChunkHeader, pack
from kvstore.codecs.frame import ENCRYPTION_BYTES, FRONT_BYTES, Frame, pack_frame
from kvstore.integrity.checks import Integrity
from kvstore.integrity.mac import identity, owner_bytes

_CHECKSUM_BYTES = 8
_TAG_BYTES = ENCRYPTION_BYTES - _CHECKSUM_BYTES


def encrypted(integrity: Integrity, header: ChunkHeader, frame: Frame, body: memoryview) -> memoryview:
    """The chunk as it is to be saved. `frame`: of `body` as it is. The secret is the newest one of `integrity`."""
    assert integrity.secrets is not None, "a cluster file that asks for encryption has a secret"
    secret, nonce = integrity.secrets.newest, integrity.draw(NONCE_BYTES)
    frame = replace(frame, body_bytes=body.nbytes + ENCRYPTION_BYTES, key_id=secret.id, nonce=nonce)
    value = memoryview(bytearray(FRONT_BYTES + frame.body_bytes))
    value[:HEADER_BYTES], value[HEADER_BYTES:FRONT_BYTES] = pack(replace(header, checksum=0)), pack_frame(frame)
    encryptor = Cipher(AES(_key(secret, header)), GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(identity(header) + value[HEADER_BYTES:FRONT_BYTES])
    at = FRONT_BYTES
    at += encryptor.update_into(header.checksum.to_bytes(_CHECKSUM_BYTES, "little"), value[at : at + _CHECKSUM_BYTES])
    for start in range(0, body.nbytes, PART_BYTES):
        part = body[start : start + PART_BYTES]
        at += encryptor.update_into(part, value[at : at + part.nbytes])
    encryptor.finalize()
    value[at:] = encryptor.tag
    return value


def decrypted(
    secret: ClusterKey, header: ChunkHeader, frame: Frame, body: memoryview, into: memoryview
) -> ChunkHeader | None:
    """Fill `into`, which is ENCRYPTION_BYTES shorter than `body`; the header with its checksum. None: it was changed,
    or is another chunk's, and what is in `into` means nothing."""
    decryptor = Cipher(AES(_key(secret, header)), GCM(frame.nonce)).decryptor()
    decryptor.authenticate_additional_data(identity(header) + pack_frame(frame))
    checksum = decryptor.update(body[:_CHECKSUM_BYTES])
    body, tag = body[_CHECKSUM_BYTES:-_TAG_BYTES], bytes(body[-_TAG_BYTES:])
    for start in range(0, body.nbytes, PART_BYTES):
        part = body[start : start + PART_BYTES]
        decryptor.update_into(part, into[start : start + part.nbytes])
    try:
        decryptor.finalize_with_tag(tag)
    except InvalidTag:
        return None
    return replace(header, checksum=int.from_bytes(checksum, "little"))


def _key(secret: ClusterKey, header: ChunkHeader) -> bytes:
    return secret.derive(KeyLabel.CHUNKS, b"encrypt" + owner_bytes(header))
