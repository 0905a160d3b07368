import subprocess
import sys
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.chunk_keys import (
    KeyChain,
    adapted_salt,
    adapter_identity,
    chunk_keys,
    next_key,
    owner_of,
    prompt_keys,
    rank_key,
    root_key,
    split_adapter,
    usable_chunks,
)

FINGERPRINT = bytes(range(16))
TOKENS = [0, 1, 2, 3, 255, 256, 65_535, 49_151, 4_294_967_295, 7, 7, 7, 42]

# The published vector (docs/wire-formats.md). It may never change: changing it orphans every stored chunk.
ROOT_HEX = "e252009752e9cb542461db7f1aec6171"
SALTED_ROOT_HEX = "6714d4906cac65fa44aa5db691349505"
KEYS_HEX = ["797603167f3a0d8fe3e4c59f978fc51e", "0a5a69c0ea1306314cc7d3fa15ba928e", "97d114d699e40710663d4adccb544f9d"]

# Those of next_key and rank_key stand beside the example of the text.
DOC_KEYS_HEX = ["918c53c01a759ed397bdfebaf00dceab", "ae60fbe3a0a66ce413c547d8e6682e12"]
REST_HEX, RANK_1_HEX = "0c6a7df5392caafed2cd336aaab31487", "b8ca6bfcc3fb016fe98957702a00b3f2"

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=60)
sizes = st.integers(1, 16)


def test_the_published_vector():
    root = root_key(FINGERPRINT)
    assert root.hex() == ROOT_HEX
    assert root_key(FINGERPRINT, b"tenant-a").hex() == SALTED_ROOT_HEX
    assert [key.hex() for key in chunk_keys(root, TOKENS, 4)] == KEYS_HEX


def test_the_vector_follows_from_the_written_definition():
    root = sha256(b"kvferry.chunk.v1" + FINGERPRINT + (0).to_bytes(4, "little")).digest()[:16]
    first = sha256(root + b"".join(token.to_bytes(4, "little") for token in TOKENS[:4])).digest()[:16]
    assert (root.hex(), first.hex()) == (ROOT_HEX, KEYS_HEX[0])


def test_keys_are_the_same_in_another_process_with_another_hash_seed():
    code = (
        f"from kvcore.chunk_keys import *;print([k.hex() for k in chunk_keys(root_key(bytes(range(16))), {TOKENS}, 4)])"
    )
    run = subprocess.run([sys.executable, "-R", "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == str(KEYS_HEX)


@given(tokens, tokens, sizes)
def test_a_prefix_has_the_same_keys_whatever_follows(prefix, rest, size):
    root = root_key(FINGERPRINT)
    keys = chunk_keys(root, prefix, size)
    assert len(keys) == len(prefix) // size
    assert chunk_keys(root, prefix + rest, size)[: len(keys)] == keys


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60), sizes, st.data())
def test_a_changed_token_changes_its_chunk_and_all_after_and_none_before(token_ids, size, data):
    at = data.draw(st.integers(0, len(token_ids) - 1))
    changed = [*token_ids[:at], (token_ids[at] + 1) % 2**32, *token_ids[at + 1 :]]
    root = root_key(FINGERPRINT)
    pairs = list(zip(chunk_keys(root, token_ids, size), chunk_keys(root, changed, size), strict=True))
    assert [left == right for left, right in pairs] == [index < at // size for index in range(len(pairs))]


@given(st.binary(max_size=8), st.binary(max_size=8))
def test_salts_and_fingerprints_separate_tenants_and_weights(left, right):
    assert (root_key(FINGERPRINT, left) == root_key(FINGERPRINT, right)) == (left == right)
    assert root_key(bytes(16), left) != root_key(FINGERPRINT, left)


def test_equal_chunks_at_different_places_have_different_keys():
    first, second = chunk_keys(root_key(FINGERPRINT), [5, 5, 5, 5], 2)
    assert first != second


def test_the_published_vectors_of_a_rest_and_of_a_rank():
    first, second = chunk_keys(root_key(FINGERPRINT, b"tenant"), range(1, 9), 4)
    assert [first.hex(), second.hex()] == DOC_KEYS_HEX
    assert next_key(second, [9, 10]).hex() == REST_HEX
    assert rank_key(second, 1).hex() == RANK_1_HEX
    assert rank_key(second, 0) == second


def test_the_vectors_of_a_rest_and_of_a_rank_follow_from_the_written_definition():
    second = bytes.fromhex(DOC_KEYS_HEX[1])
    rest = sha256(second + (9).to_bytes(4, "little") + (10).to_bytes(4, "little")).digest()[:16]
    rank = sha256(b"kvferry.rank.v1" + second + (1).to_bytes(4, "little")).digest()[:16]
    assert (rest.hex(), rank.hex()) == (REST_HEX, RANK_1_HEX)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60), sizes)
def test_the_key_of_one_more_chunk_is_the_chains_own_if_it_is_full(token_ids, size):
    root = root_key(FINGERPRINT)
    keys = chunk_keys(root, token_ids, size)
    rest = token_ids[len(keys) * size :]
    parents = [root, *keys]
    assert [next_key(parents[n], token_ids[n * size : (n + 1) * size]) for n in range(len(keys))] == keys
    if rest:
        assert next_key(parents[-1], rest) not in keys


def test_each_length_of_a_rest_has_a_key_of_its_own():
    root = root_key(FINGERPRINT)
    assert len({next_key(root, TOKENS[:count]) for count in range(1, len(TOKENS) + 1)}) == len(TOKENS)


def test_ranks_have_different_keys():
    (key,) = chunk_keys(root_key(FINGERPRINT), [1, 2], 2)
    assert len({rank_key(key, rank) for rank in range(300)}) == 300
    assert rank_key(key, 1) != next_key(key, [1]), "a rank is not a token"


@pytest.mark.parametrize("token", [-1, 2**32])
def test_token_ids_out_of_range_are_refused(token):
    with pytest.raises(OverflowError):
        chunk_keys(root_key(FINGERPRINT), [token], 1)


def test_a_fingerprint_of_another_length_is_refused():
    with pytest.raises(ValueError, match="16 bytes"):
        root_key(b"short")


@pytest.mark.parametrize(("num_tokens", "chunks"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_at_least_one_token_is_left_to_compute(num_tokens, chunks):
    assert usable_chunks(num_tokens, 4) == chunks


def test_the_owner_is_of_the_salt_alone():
    assert owner_of(b"tenant").hex() == "e9a70e84b9052ba3"
    assert owner_of(b"").hex() == "d0027bee3f5fd982"
    assert owner_of(b"tenant") == sha256(b"kvferry.owner.v1" + b"tenant").digest()[:8]


SALTS = [b"kvt1." + tenant * 32 + b"." + b"c" * 32 for tenant in (b"a", b"b")]


@pytest.mark.parametrize("public", [1, 2, 3, 5])
def test_public_chunks_have_one_key_for_all_and_what_follows_has_each_tenants_own(public):
    tokens, mine, theirs = list(range(1, 23)), *(salt + b".p%d" % public for salt in SALTS)
    keys, others = prompt_keys(FINGERPRINT, mine, tokens, 4), prompt_keys(FINGERPRINT, theirs, tokens, 4)
    assert len(keys) == len(others) == 5
    assert keys[:public] == others[:public] == chunk_keys(root_key(FINGERPRINT, b"kvp1."), tokens, 4)[:public]
    assert not set(keys[public:]) & set(others[public:])
    alone = prompt_keys(FINGERPRINT, SALTS[0], tokens, 4)
    assert not set(alone) & {*keys, *others}, "a prompt without the public beginning shares nothing"
    assert owner_of(mine) == owner_of(SALTS[0]) != owner_of(theirs)


def test_the_published_fork_holds():
    keys = prompt_keys(bytes(range(16)), SALTS[0] + b".p1", list(range(1, 9)), 4)
    assert [key.hex() for key in keys] == ["caa48870140a5863cc6961b9089980b7", "5a91c77d33f0b196bb4d4919cd0c3192"]


@pytest.mark.parametrize("steps", [(1, 2, 3, 4, 5), (3, 5), (5,), (2, 2, 9)])
def test_a_chain_is_the_same_however_it_grows(steps):
    tokens, salt = list(range(1, 23)), SALTS[0] + b".p2"
    chain, keys = KeyChain.of(FINGERPRINT, salt), []
    for stop in steps:
        chain.extend(keys, tokens, stop, 4)
    assert keys == prompt_keys(FINGERPRINT, salt, tokens, 4)
    assert next_key(chain.parent(keys, 2), tokens[8:12]) == keys[2]


@pytest.mark.parametrize("end", [b".p0", b".p", b".p01", b".p1x", b".p-1", b".p1234567", b"p1"])
def test_what_only_looks_like_a_public_salt_is_a_salt(end):
    chain = KeyChain.of(FINGERPRINT, SALTS[0] + end)
    assert chain == KeyChain(root_key(FINGERPRINT, SALTS[0] + end))
    assert KeyChain.of(FINGERPRINT, b"").root == root_key(FINGERPRINT)


# Of docs/wire-formats.md: they may never change either.
ADAPTER_HEX = "5149215c6f6ce1e949661590b175a6f2"
ADAPTED_KEY_HEX = "825cae7b2a98916a715bffa14e28af19"


def test_the_published_vector_of_an_adapter():
    identity = adapter_identity("sql", bytes(32))
    assert identity == ADAPTER_HEX
    assert identity == sha256(b"kvferry.adapter.v1" + (3).to_bytes(4, "little") + b"sql" + bytes(32)).hexdigest()[:32]
    salt = adapted_salt(identity, b"tenant")
    assert salt == f"kva1.{identity}.tenant".encode()
    assert prompt_keys(FINGERPRINT, salt, range(1, 5), 4)[0].hex() == ADAPTED_KEY_HEX


_IDENTITIES = st.sampled_from(
    ["", adapter_identity("a", b""), adapter_identity("a", b"other"), adapter_identity("b", b"")]
)
_TENANTS = st.sampled_from([b"", b"x", b"kvt1." + b"a" * 32 + b"." + b"b" * 32])


@given(st.tuples(_IDENTITIES, _TENANTS, st.integers(0, 2)), st.tuples(_IDENTITIES, _TENANTS, st.integers(0, 2)))
def test_adapters_and_tenants_share_keys_where_all_is_the_same_or_public_alone(left, right):
    """An adapter's public chunks are shared by its tenants, and by no other adapter."""

    def salt(adapter, tenant, public):
        return adapted_salt(adapter, tenant + b".p%d" % public if public and tenant.startswith(b"kvt1.") else tenant)

    def keys(one):
        return prompt_keys(FINGERPRINT, salt(*one), TOKENS, 4)

    assert split_adapter(salt(*left)) == (left[0], salt("", *left[1:]))
    assert owner_of(salt(*left)) == owner_of(salt("", *left[1:]))
    same = [one == other for one, other in zip(keys(left), keys(right), strict=True)]
    if left[0] != right[0]:
        assert not any(same)
    elif salt(*left) == salt(*right):
        assert all(same)
    else:
        assert not same[-1]


@given(st.binary(max_size=60))
def test_a_salt_that_only_looks_like_an_adapters_is_a_salt(salt):
    found, rest = split_adapter(salt)
    assert (found, rest) == ("", salt) or adapted_salt(found, rest) == salt
