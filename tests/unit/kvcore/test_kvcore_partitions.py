"""Which partition a key belongs to, and which slice of a segment is whose."""

import os
from collections import Counter
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.extents import ALIGNMENT
from kvcore.partitions import MAX_PARTITIONS, Part, Partitions, owners_of_slots
from kvcore.types import ChunkKey

ABC = Partitions(("a", "b", "c"))
# The published vector (docs/wire-formats.md). It may never change: programs that differ look at different servers.
OWNERS_HEX = {
    "00000000000000000000000000000000": "b",
    "797603167f3a0d8fe3e4c59f978fc51e": "c",
    "0a5a69c0ea1306314cc7d3fa15ba928e": "c",
    "97d114d699e40710663d4adccb544f9d": "a",
}


def test_the_published_vector():
    keys = [ChunkKey(bytes.fromhex(key)) for key in OWNERS_HEX]
    assert [ABC.names[number] for number in ABC.numbers_of(keys)] == list(OWNERS_HEX.values())


def test_the_owner_follows_from_the_written_definition():
    for key in (ChunkKey(os.urandom(16)) for _ in range(50)):
        slot = int.from_bytes(key[:2], "big") >> 4
        weights = {
            name: int.from_bytes(
                blake2b(b"kvferry.part.v1" + slot.to_bytes(2, "little") + name.encode(), digest_size=8).digest(),
                "little",
            )
            for name in ABC.names
        }
        assert ABC.names[ABC.number_of(key)] == max(weights, key=weights.__getitem__)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=5), unique=True, min_size=2, max_size=4), st.randoms())
def test_a_further_partition_takes_keys_and_moves_no_others(names, dice):
    fewer = owners_of_slots(tuple(names[:-1]))
    order = names.copy()
    dice.shuffle(order)
    for before, now in zip(fewer, owners_of_slots(tuple(order)), strict=True):
        assert order[now] in (names[before], names[-1])


def test_keys_are_spread_about_evenly():
    for count in (2, 3, 8):
        slots = Counter(owners_of_slots(tuple(f"part-{number}" for number in range(count))))
        assert len(slots) == count and max(slots.values()) < 1.25 * 4096 / count


@given(st.integers(0, 1 << 30), st.integers(1, MAX_PARTITIONS))
def test_the_slices_of_a_segment_are_aligned_and_tile_it(size_bytes, count):
    whole, end = Partitions(tuple(str(number) for number in range(count))), 0
    for number in range(count):
        start, length = Part(whole, number).slice_of(size_bytes)
        assert start == end and start % ALIGNMENT == length % ALIGNMENT == 0
        end = start + length
    assert 0 <= size_bytes - end < ALIGNMENT


@pytest.mark.parametrize("number", range(3))
def test_each_key_is_one_partitions(number):
    part = Part(ABC, number)
    key = next(key for key in iter(lambda: ChunkKey(os.urandom(16)), None) if ABC.number_of(key) == number)
    assert part.owns(key) and not any(Part(ABC, other).owns(key) for other in range(3) if other != number)
