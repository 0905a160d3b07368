"""Keys derived from the cluster's secret, one for each purpose. Pure.

Invariant: no key tells anything of the secret or of another key, so what leaks in one place opens no other.
"""

from enum import StrEnum

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
KEY_ID_BYTES = 8

_SALT = b"kvferry cluster secret 1"
_MAX_CACHED = 4096


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


class ClusterKey:
    """One secret of the cluster: what is derived from it. `id` names it in public and tells nothing of it."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._derived: dict[tuple[str, bytes], bytes] = {}
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

    def _hkdf(self, info: bytes, length: int) -> bytes:
        return HKDF(algorithm=SHA256(), length=length, salt=_SALT, info=info).derive(self._secret)
