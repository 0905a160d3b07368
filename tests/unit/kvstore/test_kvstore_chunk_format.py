import dataclasses

import pytest

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.types import ChunkKey
from kvstore.chunk_format import (
    HEADER_BYTES,
    ChunkHeader,
    Expected,
    RunningChecksum,
    checksum,
    pack,
    parse,
    verify,
)
from kvstore.types import GetOutcome

PAYLOAD = bytes(range(256))
HEADER = ChunkHeader(
    key=ChunkKey(bytes(range(16))),
    fingerprint=bytes(range(16, 32)),
    token_count=4,
    payload_length=256,
    checksum=0x9408A4433B952D71,
    generation=0x0123456789ABCDEF,
)
EXPECTED = Expected(HEADER.key, HEADER.fingerprint, HEADER.generation, 256)
VIEWS = [memoryview(PAYLOAD)[:100], memoryview(PAYLOAD)[100:]]


def outcome(expected: Expected = EXPECTED, payload: bytes = PAYLOAD, *, check_payload: bool = True) -> GetOutcome:
    return verify(pack(HEADER), expected, [memoryview(payload)], check_payload=check_payload)


def test_the_published_header_vector_holds():
    assert pack(HEADER).hex() == (
        "4b56464348554e4b0100800004000000000102030405060708090a0b0c0d0e0f"
        "101112131415161718191a1b1c1d1e1f0001000000000000712d953b43a40894"
        "efcdab8967452301000000000000000000000000000000000000000000000000"
        "00000000000000000000000000000000000000000000000000000000cd067314"
    )
    assert parse(pack(HEADER)) == HEADER


def test_the_checksum_is_the_published_one_however_the_payload_is_cut():
    assert checksum([memoryview(PAYLOAD)]) == HEADER.checksum
    assert checksum(VIEWS) == HEADER.checksum
    assert checksum([]) == checksum([memoryview(b"")])


@pytest.mark.parametrize("size", [1, 100, HEADER_BYTES, HEADER_BYTES + 256])
def test_the_running_checksum_is_the_same_however_header_and_payload_pass(size):
    running, whole = RunningChecksum(256), memoryview(pack(HEADER) + PAYLOAD)
    for start in range(0, len(whole), size):
        assert running.value is None, "not all has passed"
        running.show(whole[start : start + size])
    assert running.value == HEADER.checksum


def test_a_running_checksum_that_saw_too_much_says_nothing():
    running = RunningChecksum(256)
    running.show(memoryview(bytes(HEADER_BYTES + 257)))
    assert running.value is None


def test_a_checksum_known_from_the_way_takes_the_place_of_the_payloads():
    raw = memoryview(pack(HEADER))
    assert verify(raw, EXPECTED, VIEWS, known_checksum=HEADER.checksum) is GetOutcome.OK
    assert verify(raw, EXPECTED, VIEWS, known_checksum=HEADER.checksum ^ 1) is GetOutcome.CHECKSUM


def test_every_flipped_bit_of_a_header_is_malformed():
    raw = pack(HEADER)
    for index in range(HEADER_BYTES):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[index] ^= 1 << bit
            assert parse(bytes(damaged)) is None
            assert verify(bytes(damaged), EXPECTED, VIEWS) is GetOutcome.MALFORMED


def test_a_reserved_byte_that_is_set_is_refused_even_under_a_right_crc():
    import struct
    import zlib

    body = bytearray(pack(HEADER)[:-4])
    body[80] = 1
    assert parse(bytes(body) + struct.pack("<I", zlib.crc32(body))) is None


def test_a_truncated_header_is_malformed():
    assert parse(pack(HEADER)[:-1]) is None
    assert parse(b"") is None


def test_other_weights_are_foreign_and_another_tenant_of_the_place_is_stale():
    assert outcome(dataclasses.replace(EXPECTED, fingerprint=bytes(16))) is GetOutcome.FOREIGN
    assert outcome(dataclasses.replace(EXPECTED, key=ChunkKey(bytes(16)))) is GetOutcome.STALE
    assert outcome(dataclasses.replace(EXPECTED, generation=HEADER.generation - 1)) is GetOutcome.STALE


def test_another_length_than_announced_is_malformed():
    assert outcome(dataclasses.replace(EXPECTED, payload_length=255)) is GetOutcome.MALFORMED
    assert outcome(payload=PAYLOAD[:-1]) is GetOutcome.MALFORMED


def test_a_flipped_payload_byte_is_a_checksum_miss_unless_checking_is_off():
    damaged = bytearray(PAYLOAD)
    damaged[200] ^= 1
    assert outcome(payload=bytes(damaged)) is GetOutcome.CHECKSUM
    assert outcome(payload=bytes(damaged), check_payload=False) is GetOutcome.OK
    assert outcome() is GetOutcome.OK


@pytest.mark.parametrize(
    "change", [{"token_count": 1 << 32}, {"generation": -1}, {"payload_length": 1 << 64}, {"key": b"short"}]
)
def test_a_field_that_does_not_fit_is_our_own_error(change):
    with pytest.raises(ValueError):
        pack(dataclasses.replace(HEADER, **change))


def test_the_published_key_vector_holds():
    root = root_key(bytes(range(16)), b"tenant")
    assert root.hex() == "b49b2195d8aa505e0a4536f842317463"
    assert root_key(bytes(range(16))).hex() == "e252009752e9cb542461db7f1aec6171"
    assert [key.hex() for key in chunk_keys(root, list(range(1, 9)), 4)] == [
        "918c53c01a759ed397bdfebaf00dceab",
        "ae60fbe3a0a66ce413c547d8e6682e12",
    ]
