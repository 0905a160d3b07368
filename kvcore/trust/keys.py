"""Keys derived from the cluster's secret, one for each purpose. Pure.

Invariant: no key tells anything of the secret or of another key, so what leaks in one place opens no other.
"""

import hashlib
from enum import StrEnum

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
KEY_ID_BYTES = 8

_SALT = b"kvferry cluster secret 1"
_MAX_CACHED = 4096
_INNER, _OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))
"""What each byte of a key becomes in HMAC's two hashes."""


class KeyLabel(StrEnum):
    """What a key is for."""

    HTTP = "http"
    """Proofs of HTTP requests between our processes."""
    GREETING = "greeting"
    """Proofs of transports' greetings."""
    ADDRESSES = "addresses"
    """Encryption of segments' addresses."""
    CHUNKS = "chunks"
    """MACs and encryption of chunks."""
    TENANTS = "tenants"
    """Salts of tenants."""


class MacKey:
    """HMAC-SHA-256 (RFC 2104) under one key. What it hashes of the key itself is hashed once: `hmac.digest` does that
    for each message, which is most of what a short one costs."""

    def __init__(self, key: bytes) -> None:
        assert len(key) <= 64, "a longer one would be hashed first"
        block = key.ljust(64, b"\0")
        self._inner, self._outer = hashlib.sha256(block.translate(_INNER)), hashlib.sha256(block.translate(_OUTER))

    def __repr__(self) -> str:
        return "<MacKey>"

    def digest(self, message: bytes) -> bytes:
        """32 bytes."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()


class ClusterKey:
    """One secret of the cluster: what is derived from it. `id` names it in public and tells nothing of it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._derived: dict[tuple[str, bytes], bytes] = {}
        self._macs: dict[tuple[str, bytes], MacKey] = {}
        self.id = self._hkdf(b"id", KEY_ID_BYTES)
        self.name = self.id.hex()

    def __repr__(self) -> str:
        return f"<ClusterKey {self.id.hex()}>"

    def derive(self, label: KeyLabel, context: bytes = b"") -> bytes:
        """32 bytes (HKDF-SHA-256) that depend on the secret, the label and the context alone. Remembered."""
        known = self._derived.get((label, context))
        if known is None:
            if len(self._derived) >= _MAX_CACHED:
                self._derived.clear()
            known = self._hkdf(label.encode() + b"\0" + context, KEY_BYTES)
            self._derived[label, context] = known
        return known

    def mac_key(self, label: KeyLabel, context: bytes = b"") -> MacKey:
        """Of what `derive` gives. Remembered."""
        known = self._macs.get((label, context))
        if known is None:
            if len(self._macs) >= _MAX_CACHED:
                self._macs.clear()
            known = self._macs[label, context] = MacKey(self.derive(label, context))
        return known

    def _hkdf(self, info: bytes, length: int) -> bytes:
        return HKDF(algorithm=SHA256(), length=length, salt=_SALT, info=info).derive(self._secret)
