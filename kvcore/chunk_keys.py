"""Chunk keys: the name under which the KV of one chunk of tokens is stored.

A key is the first 16 bytes of a SHA-256 over the parent key and the chunk's token ids, so it stands for the whole
prefix up to the chunk's end. The root binds it to the KV's provenance (`KVSpec.fingerprint`) and to a tenant's salt:
two tenants, two weights or two layouts never share a key.

    root  = SHA256(b"kvferry.chunk.v1" || fingerprint[16] || u32le(len(salt)) || salt)[:16]
    key_i = SHA256(key_{i-1} || u32le(token) * chunk_tokens)[:16]
    owner = SHA256(b"kvferry.owner.v1" || salt)[:8]

The owner says whose quota chunks count for. It is of the salt alone: a tenant is one, whatever weights are served. Of a
salt that the router has made for a tenant (`kvcore.tenants.salts`) it is of the tenant's part, `kvt1.` and 32 digits: a
client's own salt gives nobody another quota.

Behind a public prefix, which all tenants share, a tenant's chain goes on alone. Its salt says of how many chunks that
is, `.p` and a number at its end: so many have the root of the salt `kvp1.`, and the next one's parent is

    fork = SHA256(b"kvferry.fork.v1" || key of the last public chunk || u32le(len(salt)) || salt)[:16]

KV that a LoRA adapter has made has a salt that begins with `kva1.`, 32 hex digits of the adapter's identity and a dot;
then comes the salt that it would have without. An engine computes a request with the adapter that its salt names, so
that what lies under a key and how it was computed cannot differ. The owner is that of the salt without.

    identity = hex(SHA256(b"kvferry.adapter.v1" || u32le(len(name)) || name || digest of its files)[:16])

The published test vector is in `tests/unit/kvcore/test_chunk_keys.py` and docs/wire-formats.md: another
implementation is right if it gives the same bytes. Never Python's `hash()`, which differs between processes.
"""

import array
import re
import sys
from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from kvcore.types import ChunkKey, OwnerTag

KEY_BYTES = 16
OWNER_BYTES = 8
TENANT_SALT = b"kvt1."
"""How a tenant's salt begins."""
PUBLIC_SALT = b"kvp1."
_WITH_PUBLIC = re.compile(rb"kvt1\.[0-9a-f]{32}\.[0-9a-f]{32}\.p([1-9][0-9]{0,5})")
ADAPTER_SALT = b"kva1."
"""How the salt of KV that an adapter has made begins; a client's own must not."""
_ADAPTER_PART = re.compile(rb"kva1\.([0-9a-f]{32})\.")
_ADAPTER_DOMAIN = b"kvferry.adapter.v1"
_FORK_DOMAIN = b"kvferry.fork.v1"
_TENANT_PART = len(TENANT_SALT) + 32
_DOMAIN = b"kvferry.chunk.v1"
_OWNER_DOMAIN = b"kvferry.owner.v1"
_RANK_DOMAIN = b"kvferry.rank.v1"


def root_key(fingerprint: bytes, salt: bytes = b"") -> ChunkKey:
    """The parent of the first chunk. `fingerprint` is 16 bytes, `salt` any length (empty: shared by all)."""
    if len(fingerprint) != KEY_BYTES:
        raise ValueError(f"a fingerprint has {KEY_BYTES} bytes, got {len(fingerprint)}")
    return ChunkKey(sha256(_DOMAIN + fingerprint + len(salt).to_bytes(4, "little") + salt).digest()[:KEY_BYTES])


def owner_of(salt: bytes) -> OwnerTag:
    """Whose chunks those with this salt are; without one they are those of one tenant, too."""
    _, salt = split_adapter(salt)
    if salt.startswith(TENANT_SALT) and salt[_TENANT_PART : _TENANT_PART + 1] == b".":
        salt = salt[:_TENANT_PART]
    return OwnerTag(sha256(_OWNER_DOMAIN + salt).digest()[:OWNER_BYTES])


def own_salt(salt: bytes) -> bytes:
    """Without what it says of a public prefix."""
    return salt[: salt.rindex(b".p")] if _WITH_PUBLIC.fullmatch(split_adapter(salt)[1]) else salt


def adapter_identity(name: str, digest: bytes) -> str:
    """32 hex digits that stand for an adapter: another name or other files (`digest`, of any length), another one."""
    size = len(name.encode()).to_bytes(4, "little")
    return sha256(_ADAPTER_DOMAIN + size + name.encode() + digest).hexdigest()[: 2 * KEY_BYTES]


def adapted_salt(identity: str, salt: bytes) -> bytes:
    """That of KV which the adapter makes where the model alone would have `salt`. Empty: the model alone."""
    return ADAPTER_SALT + identity.encode() + b"." + salt if identity else salt


def split_adapter(salt: bytes) -> tuple[str, bytes]:
    """The identity of the adapter that a salt names, empty if none, and the salt without it."""
    found = _ADAPTER_PART.match(salt) if salt.startswith(ADAPTER_SALT) else None
    return (found[1].decode(), salt[found.end() :]) if found else ("", salt)


def chunk_keys(root: ChunkKey, token_ids: Sequence[int], chunk_tokens: int) -> list[ChunkKey]:
    """Keys of all full chunks of `token_ids`, in order; a rest shorter than `chunk_tokens` has no key.

    Token ids lie in [0, 2**32). Raises OverflowError for others.
    """
    packed = array.array("I", token_ids)
    if packed.itemsize != 4:  # a platform whose C int is not 32 bits wide
        packed = array.array("L", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    raw = packed.tobytes()
    step = 4 * chunk_tokens
    keys: list[ChunkKey] = []
    parent: bytes = root
    for start in range(0, len(raw) - step + 1, step):
        parent = sha256(parent + raw[start : start + step]).digest()[:KEY_BYTES]
        keys.append(ChunkKey(parent))
    return keys


class KeyChain(NamedTuple):
    """How the keys of one prompt follow from each other. `salt`: of those behind `public_chunks`."""

    root: ChunkKey
    public_chunks: int = 0
    salt: bytes = b""

    @classmethod
    def of(cls, fingerprint: bytes, salt: bytes) -> "KeyChain":
        """That of a request with this salt."""
        adapter, own = split_adapter(salt)
        found = _WITH_PUBLIC.fullmatch(own)
        if found is None:
            return cls(root_key(fingerprint, salt))
        return cls(root_key(fingerprint, adapted_salt(adapter, PUBLIC_SALT)), int(found[1]), salt)

    def parent(self, keys: Sequence[ChunkKey], index: int) -> ChunkKey:
        """What chunk `index` continues. `keys`: of all before it, at least."""
        if not index:
            return self.root
        if index != self.public_chunks:
            return keys[index - 1]
        size = len(self.salt).to_bytes(4, "little")
        return ChunkKey(sha256(_FORK_DOMAIN + keys[index - 1] + size + self.salt).digest()[:KEY_BYTES])

    def extend(self, keys: list[ChunkKey], token_ids: Sequence[int], stop: int, chunk_tokens: int) -> None:
        """Append the keys of full chunks up to `stop`, as far as there are tokens. `token_ids`: from the beginning."""
        while (known := len(keys)) < stop:
            end = self.public_chunks if known < self.public_chunks < stop else stop
            tokens = token_ids[known * chunk_tokens : end * chunk_tokens]
            more = chunk_keys(self.parent(keys, known), tokens, chunk_tokens)
            if not more:
                return
            keys += more


def prompt_keys(fingerprint: bytes, salt: bytes, token_ids: Sequence[int], chunk_tokens: int) -> list[ChunkKey]:
    """Keys of all full chunks of a request's prompt."""
    keys: list[ChunkKey] = []
    KeyChain.of(fingerprint, salt).extend(keys, token_ids, len(token_ids) // chunk_tokens, chunk_tokens)
    return keys


def next_key(parent: ChunkKey, token_ids: Sequence[int]) -> ChunkKey:
    """The key of one more chunk behind `parent`, of any length from one token on: a prompt's rest can be one too."""
    return chunk_keys(parent, token_ids, len(token_ids))[0]


def rank_key(key: ChunkKey, rank: int) -> ChunkKey:
    """The key of one tensor-parallel rank's part: `key` itself for rank 0, else
    SHA256(b"kvferry.rank.v1" || key || u32le(rank))[:16]. The words in front tell it from the key of one more token.

    `key` is of the chain whose root has rank 0's fingerprint; each rank's header has its own.
    """
    if rank == 0:
        return key
    return ChunkKey(sha256(_RANK_DOMAIN + key + rank.to_bytes(4, "little")).digest()[:KEY_BYTES])


def usable_chunks(num_tokens: int, chunk_tokens: int) -> int:
    """How many leading chunks of a prompt a cache may serve: at least one token is left to compute, for its logits."""
    return max(0, num_tokens - 1) // chunk_tokens
