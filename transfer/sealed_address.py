"""Addresses that only the processes of one cluster can open: AES-256-GCM under keys of its secrets. Pure.

For transports where whoever has a segment's address can read and write it, and whose libraries ask nobody
(docs/wire-formats.md). An address is sealed for each secret that is accepted: while the secret is changed, those open
it too that know only one of the two.
"""

import base64
import binascii
import secrets as random
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvcore.errors import TransferProofError
from kvcore.trust.keys import KEY_BYTES, KEY_ID_BYTES, ClusterKey, KeyLabel
from kvcore.trust.opening import ClusterTrust
from kvcore.types import Segment

PREFIX = "sealed:"

_VERSION = 1
_HEAD = struct.Struct("<BB")
_NONCE_BYTES, _TAG_BYTES = 12, 16
_WRAPPED = struct.Struct(f"<{KEY_ID_BYTES}s{_NONCE_BYTES}s{KEY_BYTES + _TAG_BYTES}s")
_MAX_KEYS = 8
_MAX_TEXT = 32_768
"""Longest address that is looked at."""


class AddressSeal:
    """How one segment's address is told. Sealed anew when the address is another, or the secrets are."""

    def __init__(self, trust: ClusterTrust, kind: str, segment_id: str) -> None:
        self._trust = trust
        self._about = (kind, segment_id)
        self._sealed: tuple[str, tuple[bytes, ...], str] = ("", (), "")
        """An address, the secrets that it was sealed for, and what came of it."""

    def __repr__(self) -> str:
        return f"<AddressSeal {' '.join(self._about)} for {self._trust.secrets!r}>"

    def told(self, address: str) -> str:
        """`address` (base64) as it is told to others; the same text as long as nothing changed."""
        if self._trust.secrets is None or not address:
            return address
        keys = self._trust.secrets.accepted
        ids = tuple(key.id for key in keys)
        if self._sealed[:2] != (address, ids):
            self._sealed = (address, ids, _seal(keys, self._trust.cluster, self._about, base64.b64decode(address)))
        return self._sealed[2]


def open_address(trust: ClusterTrust, kind: str, segment: Segment) -> str:
    """What the segment's host had sealed; as it is, where there is no secret. Raises TransferProofError for what was
    not sealed by a process of this cluster for this transport and segment."""
    told = segment.addresses.get(kind, "")
    where = f"segment {segment.id}: its {kind} address"
    if trust.secrets is None:
        if told.startswith(PREFIX):
            raise TransferProofError(f"{where} is sealed by a cluster's secret, and this process has none")
        return told
    if not told.startswith(PREFIX):
        raise TransferProofError(f"{where} is not sealed: what serves it does not know this cluster's secret")
    wrapped, body = _parsed(told, where)
    for key_id, nonce, content_key in wrapped:
        key = trust.secrets.find(key_id)
        if key is not None:
            about = _context(kind, segment.id)
            try:
                opened = AESGCM(_key(key, trust.cluster)).decrypt(nonce, content_key, about)
                address = AESGCM(opened).decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], about)
            except InvalidTag:
                raise TransferProofError(
                    f"{where} does not open: it was changed, or is of another cluster, transport or segment"
                ) from None
            return base64.b64encode(address).decode()
    shown = " and ".join(key_id.hex() for key_id, _, _ in wrapped) or "none"
    known = " and ".join(key.id.hex() for key in trust.secrets.accepted)
    raise TransferProofError(f"{where} is sealed for secret {shown}, and this process knows {known}")


def _seal(keys: tuple[ClusterKey, ...], cluster: str, about: tuple[str, str], address: bytes) -> str:
    """The address under a key of its own, and that key under one of each secret."""
    context, content_key = _context(*about), random.token_bytes(KEY_BYTES)
    parts = [_HEAD.pack(_VERSION, len(keys))]
    for key in keys:
        nonce = random.token_bytes(_NONCE_BYTES)
        wrapped = AESGCM(_key(key, cluster)).encrypt(nonce, content_key, context)
        parts.append(_WRAPPED.pack(key.id, nonce, wrapped))
    nonce = random.token_bytes(_NONCE_BYTES)
    parts += nonce, AESGCM(content_key).encrypt(nonce, address, context)
    return PREFIX + base64.b64encode(b"".join(parts)).decode()


def _parsed(told: str, where: str) -> tuple[list[tuple[bytes, bytes, bytes]], bytes]:
    """(secret's id, nonce, sealed key) of each, and what follows: a nonce and the sealed address."""
    try:
        raw = base64.b64decode(told.removeprefix(PREFIX)[:_MAX_TEXT], validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    version, count = _HEAD.unpack_from(raw) if len(raw) >= _HEAD.size else (0, 0)
    end = _HEAD.size + count * _WRAPPED.size
    if version != _VERSION or count > _MAX_KEYS or len(raw) < end + _NONCE_BYTES + _TAG_BYTES:
        raise TransferProofError(f"{where} is cut short, or sealed in a form that this version does not know")
    return list(_WRAPPED.iter_unpack(raw[_HEAD.size : end])), raw[end:]


def _context(kind: str, segment_id: str) -> bytes:
    return kind.encode() + b"\0" + segment_id.encode()


def _key(key: ClusterKey, cluster: str) -> bytes:
    return key.derive(KeyLabel.ADDRESSES, cluster.encode())
