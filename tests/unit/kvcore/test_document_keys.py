"""The keys of documents: the published vector, and what they do and do not depend on."""

from hashlib import sha256

import pytest

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.documents.keys import document_keys, document_root

FINGERPRINT = bytes(range(16))
HEADER, TEXT = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]
TENANT = b"kvt1." + b"a" * 32 + b"." + b"c" * 32

# The published vector (docs/wire-formats.md). It may never change: changing it orphans every stored document.
ROOT_HEX = "d7389cbe445168856af5e28fe010aad8"
KEYS_HEX = ["8487061268090ec46baf5e48827dd0eb", "550fe810a662fa85948ee8e53bb11919"]


def test_the_published_vector():
    root = document_root(FINGERPRINT, b"tenant", HEADER, 4)
    assert (root.hex(), [key.hex() for key in document_keys(root, TEXT, 4)]) == (ROOT_HEX, KEYS_HEX)


def test_the_vector_follows_from_the_written_definition():
    def digest(*parts: bytes) -> bytes:
        return sha256(b"".join(parts)).digest()[:16]

    def packed(tokens: list[int]) -> bytes:
        return b"".join(token.to_bytes(4, "little") for token in tokens)

    salted = FINGERPRINT + (6).to_bytes(4, "little") + b"tenant"
    header = digest(digest(digest(b"kvferry.chunk.v1", salted), packed(HEADER[:4])), packed(HEADER[4:]))
    root = digest(b"kvferry.document.v1", salted, header)
    first = digest(root, packed(TEXT[:4]))
    assert [root.hex(), first.hex(), digest(first, packed(TEXT[4:])).hex()] == [ROOT_HEX, *KEYS_HEX]


@pytest.mark.parametrize(
    ("fingerprint", "salt", "header"),
    [
        (bytes(16), b"tenant", HEADER),
        (FINGERPRINT, b"", HEADER),
        (FINGERPRINT, b"tenant", []),
        (FINGERPRINT, b"tenant", HEADER[:4]),
        (FINGERPRINT, b"tenant", [*HEADER, 7]),
    ],
)
def test_another_kind_of_kv_tenant_or_header_is_another_document(fingerprint, salt, header):
    assert document_root(fingerprint, salt, header, 4) != document_root(FINGERPRINT, b"tenant", HEADER, 4)


def test_a_document_never_has_the_keys_of_a_prompt():
    """Not even where there is no header: its KV is at the same positions then, but not where a prompt looks."""
    prompt = root_key(FINGERPRINT)
    root = document_root(FINGERPRINT, b"", [], 4)
    assert not {root, *document_keys(root, TEXT, 4)} & {prompt, *chunk_keys(prompt, TEXT, 4)}


def test_how_much_of_a_prompt_is_public_does_not_matter():
    for public in (b".p1", b".p12"):
        assert document_root(FINGERPRINT, TENANT + public, HEADER, 4) == document_root(FINGERPRINT, TENANT, HEADER, 4)


@pytest.mark.parametrize(("length", "chunks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_the_rest_of_a_document_has_a_key(length, chunks):
    root = document_root(FINGERPRINT, b"", HEADER, 4)
    keys = document_keys(root, list(range(length)), 4)
    assert len(set(keys)) == len(keys) == chunks
