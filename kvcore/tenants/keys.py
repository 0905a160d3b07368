"""API keys and the tenants that they stand for: made, hashed, found again. Pure, but for making a new one.

A key is `kvf_ID_SECRET`: 12 hex digits by which it is found, and 32 random bytes. The file has a SHA-256 of it alone,
which is enough: nobody guesses 256 bits, so nothing is gained by a slow hash. Invariant: no key and no part of its
secret is in a repr, an error or the log.
"""

import hmac
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256
from typing import Annotated, Literal

import msgspec

Priority = Literal["low", "normal", "high"]
_KEY = re.compile(r"kvf_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_MAX_KEY_CHARS = 128
_NOBODYS = sha256(b"no key").digest()
"""What a key without a record is compared with, so that both take as long."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
TenantName = Annotated[str, msgspec.Meta(pattern=rf"^{_NAME}\Z")]
_Above = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]  # what a float counts: rates are computed of them


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tenant may have. None: no limit of its own."""

    requests_per_minute: _Above | None = None
    tokens_per_minute: _Above | None = None
    """Of prompts and completions together."""
    concurrency: _Above | None = None
    """Requests under way at a time."""
    cache_share: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    """Of each segment and each node's disk; None: `store.tenant_share`."""
    priority: Priority = "normal"
    """Who is refused first where a router has much to do, and who waits for the others."""
    first_token_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """How long a first token may take; None: `router.first_token_s`."""


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key in the file."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12}$")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    """Of the whole key."""
    tenant: TenantName
    admin: bool = False
    """Whether it may give orders and see what is not one tenant's."""
    created: str = ""
    revoked: str = ""
    """When; empty: it is not."""


class KeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file, as JSON."""

    version: Literal[1] = 1
    tenants: dict[TenantName, TenantLimits] = {}
    keys: list[KeyRecord] = []


class BadKeyFileError(ValueError):
    """A text that is no file of keys. It says what is wrong, and shows no hash."""


def is_tenant_name(text: str) -> bool:
    """Letters, digits and `._-`, 64 at most, the first a letter or digit."""
    return re.fullmatch(_NAME, text) is not None


def parse_keys(text: str | bytes) -> KeyFile:
    """Raises BadKeyFileError."""
    try:
        found = msgspec.json.decode(text, type=KeyFile)
    except msgspec.MsgspecError as error:
        where = str(error).partition(" - at `")[2].rstrip("`")
        raise BadKeyFileError(f"not a file of keys ({where or 'no JSON, or no object'})") from None
    except (UnicodeDecodeError, RecursionError):
        raise BadKeyFileError("not a file of keys (no JSON)") from None
    ids = [key.id for key in found.keys]
    if len(set(ids)) < len(ids):
        raise BadKeyFileError("two keys have the same id")
    return found


def new_key(tenant: str, *, admin: bool, created: str) -> tuple[str, KeyRecord]:
    """A key, which nobody can read from its record."""
    key_id = secrets.token_hex(6)
    key = f"kvf_{key_id}_{secrets.token_urlsafe(32)}"
    digest = sha256(key.encode()).hexdigest()
    return key, KeyRecord(id=key_id, sha256=digest, tenant=tenant, admin=admin, created=created)


class KeyRing:
    """The keys that hold."""

    def __init__(self, file: KeyFile) -> None:
        self.tenants = dict(file.tenants)
        self._records = {record.id: record for record in file.keys if not record.revoked}

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"<KeyRing of {len(self)} keys>"

    @property
    def records(self) -> Iterable[KeyRecord]:
        """Of all keys that hold."""
        return self._records.values()

    def find(self, key: str) -> KeyRecord | None:
        """The record of a key; None: it is none of ours. How long that takes tells nothing of how near it is."""
        if len(key) > _MAX_KEY_CHARS:
            return None
        given = sha256(key.encode("utf-8", "surrogateescape")).digest()
        shape = _KEY.fullmatch(key)
        record = self._records.get(shape[1]) if shape is not None else None
        wanted = bytes.fromhex(record.sha256) if record is not None else _NOBODYS
        return record if hmac.compare_digest(given, wanted) else None

    def limits(self, tenant: str) -> TenantLimits:
        """What a tenant may have."""
        return self.tenants.get(tenant, TenantLimits())
