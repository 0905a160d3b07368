"""The salt of a tenant's KV: derived from the cluster's secret, so that no client can name another tenant's. Pure.

    tenant key = HKDF(cluster's secret, "tenants", tenant)
    part(x)    = hex(HMAC-SHA256(tenant key, x)[:16])
    salt       = "kvt1." || part("tenant") || "." || part("salt" || client's salt)

and ".p" and a number at its end where so many leading chunks are public (`kvcore.chunk_keys.KeyChain`).

The first part is the tenant's, whatever its clients say: it decides whose quota chunks count for
(`kvcore.chunk_keys.owner_of`).
"""

import hmac
from collections.abc import Callable

from kvcore.chunk_keys import TENANT_SALT, owner_of
from kvcore.trust.keys import ClusterKey, KeyLabel
from kvcore.trust.secrets import Secrets
from kvcore.types import OwnerTag

_PART_BYTES = 16


class TenantSalt:
    """Salts of one tenant. `key`: 32 bytes that the cluster's secret and the tenant's name decide."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._tenant = TENANT_SALT + _part(key, b"tenant")

    def __repr__(self) -> str:
        return f"<TenantSalt of {self.owner.hex()}>"

    @property
    def owner(self) -> OwnerTag:
        """Whose quota the tenant's chunks count for."""
        return owner_of(self.of(b""))

    def of(self, client_salt: bytes, public_chunks: int = 0) -> bytes:
        """The salt of what a client of the tenant asks; without one of its own, too. `public_chunks`: so many leading
        chunks of the prompt are shared by all."""
        salt = self._tenant + b"." + _part(self._key, b"salt" + client_salt)
        return salt + b".p%d" % public_chunks if public_chunks else salt


TenantSalts = Callable[[str], TenantSalt]
"""Of each tenant, by its name."""


def salts_by(key: ClusterKey | Secrets) -> TenantSalts:
    """Derived from this key; of several secrets from the newest: one that is given up names nobody's KV any more."""
    return lambda tenant: TenantSalt(key.derive(KeyLabel.TENANTS, tenant.encode()))


def _part(key: bytes, what: bytes) -> bytes:
    return hmac.digest(key, what, "sha256")[:_PART_BYTES].hex().encode()
