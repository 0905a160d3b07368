"""Whatever becomes of a chunk's bytes: a reader with MACs, or of encrypted ones, never takes another payload for it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chunk_attacks import ATTACKS, CLUSTER, cut, sealed_chunk, whole

from kvcore.types import ChunkKey, OwnerTag
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, Expected, pack, parse
from kvstore.integrity.checks import Integrity
from kvstore.types import GetOutcome

MACS = Integrity("mac", CLUSTER)
ENCRYPTED = Integrity("mac", CLUSTER, encrypt=True)
KEYS = [ChunkKey(bytes([number]) * 16) for number in range(3)]
OWNERS = [OwnerTag(bytes([number]) * 8) for number in (1, 2)]
PRINT = bytes(range(16))
SIZE = 96


def payload(number: int, owner: int) -> bytes:
    return bytes([16 * number + owner]) * SIZE


def chunk(number: int, owner: int, integrity: Integrity) -> bytes:
    header = ChunkHeader(KEYS[number], PRINT, 4, SIZE, 0, 1, OWNERS[owner])
    return sealed_chunk(integrity, header, payload(number, owner))


POOLS = {
    one: [chunk(number, owner, one) for number in range(len(KEYS)) for owner in range(len(OWNERS))]
    for one in (MACS, ENCRYPTED)
}
EXPECTED = Expected(KEYS[0], PRINT, 1, SIZE, OWNERS[0])
FIELDS = ("token_count", "checksum", "generation", "owner", "nonce", "mac", "key_id", "key", "fingerprint")

flips = st.tuples(st.just("flip"), st.integers(0, HEADER_BYTES + SIZE - 1), st.integers(1, 255))
downgrades = st.tuples(st.just("version"), st.just(0), st.booleans())
pastes = st.tuples(st.just("paste"), st.integers(0, len(KEYS) * len(OWNERS) - 1), st.sampled_from(FIELDS))
attacks = st.tuples(st.just("attack"), st.integers(0, len(KEYS) * len(OWNERS) - 1), st.sampled_from(sorted(ATTACKS)))
mends = st.tuples(st.just("mend"), st.just(0), st.just(0))


def changed(value: bytes, pool: list[bytes], step: tuple[str, int, object]) -> bytes:
    """The chunk after one thing that somebody does to it. What is no chunk any more stays as it is but for flips."""
    what, which, how = step
    if what == "flip":
        assert isinstance(how, int)
        return value[:which] + bytes([value[which] ^ how]) + value[which + 1 :]
    if parse(value) is None:
        return value
    if what == "attack":
        return ATTACKS[str(how)].change(value, pool[which])
    header, body = cut(value)
    if what == "version":
        return pack(replace(header, encrypted=bool(how))) + body
    if what == "paste":
        header = replace(header, **{str(how): getattr(cut(pool[which])[0], str(how))})
        return pack(header) + body
    return whole(header, body)


@pytest.mark.parametrize("integrity", POOLS, ids=["mac", "encrypted"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(flips, downgrades, pastes, attacks, mends), min_size=1, max_size=5), st.integers(1, 64))
def test_no_sequence_of_changes_makes_another_payload_that_is_taken(integrity, steps, size):
    pool = POOLS[integrity]
    value = pool[0]
    for step in steps:
        value = changed(value, pool, step)
    raw, there = value[:HEADER_BYTES], memoryview(value)[HEADER_BYTES:]
    checking, came = integrity.checking(EXPECTED), memoryview(bytearray(value))
    for start in range(0, len(value), size):
        checking.show(came[start : start + size])
    body = came[HEADER_BYTES:]
    outcome = checking.outcome(raw, [body])
    assert outcome is integrity.check(raw, EXPECTED, [there])
    if outcome is GetOutcome.OK:
        assert body == payload(0, 0)
        assert (parse(raw).key, parse(raw).owner) == (KEYS[0], OWNERS[0])
