"""Keys of documents: the names under which KV of a text is stored that may be reused wherever it stands in a prompt.

A document's KV is computed behind a header alone, tokens that many prompts begin with (a system prompt), so its keys
are bound to that header and to nothing else of the prompt: provenance, salt and header make the root, its own tokens
the rest. The position that it was computed at is the header's length, which the header's tokens say.

    header = key of the header's last chunk in the prompt's chain (`kvcore.chunk_keys`); a rest counts as a chunk; an
             empty header has the chain's root
    root   = SHA256(b"kvferry.document.v1" || fingerprint[16] || u32le(len(salt)) || salt || header[16])[:16]
    key_i  = as in the prompt's chain, over the document's own chunks, counted from its first token; its rest, one token
             or more, has a key too

Of a salt that says where a public prefix ends (`.p` and a number) that part is left out, here and in the header's
chain: how much of a prompt is public says nothing of a document in it.

The test vector is in `tests/unit/kvcore/test_document_keys.py` and docs/wire-formats.md.
"""

from collections.abc import Iterable, Sequence
from hashlib import sha256

from kvcore.chunk_keys import KEY_BYTES, chunk_keys, next_key, own_salt, root_key
from kvcore.types import ChunkKey

_DOMAIN = b"kvferry.document.v1"


def document_root(fingerprint: bytes, salt: bytes, header: Sequence[int], chunk_tokens: int) -> ChunkKey:
    """The parent of the first chunk of every document behind `header`, given as its token ids. `fingerprint`: 16 bytes
    of the KVSpec; `salt`: the request's."""
    salt = own_salt(salt)
    chain = root_key(fingerprint, salt)
    last = (document_keys(chain, header, chunk_tokens) or [chain])[-1]
    return ChunkKey(sha256(_DOMAIN + fingerprint + len(salt).to_bytes(4, "little") + salt + last).digest()[:KEY_BYTES])


def document_keys(root: ChunkKey, token_ids: Sequence[int], chunk_tokens: int) -> list[ChunkKey]:
    """Keys of all chunks of a document, in order: the full ones, then that of the rest, if there is one."""
    keys = chunk_keys(root, token_ids, chunk_tokens)
    rest = token_ids[len(keys) * chunk_tokens :]
    if len(rest):
        keys.append(next_key(keys[-1] if keys else root, rest))
    return keys


def keys_of_documents(
    fingerprint: bytes,
    salt: bytes,
    prompt: Sequence[int],
    header: int,
    spans: Iterable[tuple[int, int]],
    *,
    chunk_tokens: int,
) -> list[list[ChunkKey]]:
    """Of each document of a prompt, `[start, stop)` of it, behind its first `header` tokens."""
    root = document_root(fingerprint, salt, prompt[:header], chunk_tokens)
    return [document_keys(root, prompt[start:stop], chunk_tokens) for start, stop in spans]
