import dataclasses
import zlib

import pytest
from support.sample_chunk import HEADER as SAMPLE
from support.sample_chunk import PAYLOAD, VIEWS

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.types import ChunkKey
from kvstore.chunk_format import (
    HEADER_BYTES,
    Expected,
    checksum,
    pack,
    parse,
    verify,
)
from kvstore.types import GetOutcome

HEADER = dataclasses.replace(SAMPLE, checksum=0x9408A4433B952D71)
VERSION_1 = (
    "4b56464348554e4b0100800004000000000102030405060708090a0b0c0d0e0f"
    "101112131415161718191a1b1c1d1e1f0001000000000000712d953b43a40894"
    "efcdab8967452301000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000000000000000000000000000cd067314"
)
EXPECTED = Expected(HEADER.key, HEADER.fingerprint, HEADER.generation, 256)


def outcome(expected: Expected = EXPECTED, payload: bytes = PAYLOAD) -> GetOutcome:
    return verify(pack(HEADER), expected, [memoryview(payload)])


def with_byte(raw: bytes, offset: int, value: int) -> bytes:
    """The header with one byte changed, and the CRC of that."""
    body = bytearray(raw[:-4])
    body[offset] = value
    return bytes(body) + zlib.crc32(body).to_bytes(4, "little")


def test_the_published_header_vector_holds():
    assert pack(HEADER).hex() == (
        "4b56464348554e4b0200800004000000000102030405060708090a0b0c0d0e0f"
        "101112131415161718191a1b1c1d1e1f0001000000000000712d953b43a40894"
        "efcdab8967452301a0a1a2a3a4a5a6a700000000000000000000000000000000"
        "00000000000000000000000000000000000000000000000000000000606467a5"
    )
    assert parse(pack(HEADER)) == HEADER


def test_a_header_of_version_1_is_read_and_says_of_no_owner():
    assert parse(bytes.fromhex(VERSION_1)) == dataclasses.replace(HEADER, owner=None)
    assert verify(bytes.fromhex(VERSION_1), EXPECTED, VIEWS) is GetOutcome.OK


@pytest.mark.parametrize("offset", [72, 79, 80, 92, 107, 108, 123])
def test_version_1_has_nothing_where_the_owner_and_the_mac_are(offset):
    assert parse(with_byte(bytes.fromhex(VERSION_1), offset, 1)) is None


def test_nonce_and_mac_are_kept_where_they_are_published():
    header = dataclasses.replace(HEADER, nonce=bytes(range(1, 13)), mac=bytes(range(0x40, 0x50)), key_id=b"keyident")
    raw = pack(header)
    assert (raw[80:92], raw[92:108], raw[108:116]) == (header.nonce, header.mac, header.key_id)
    assert parse(raw) == header


def test_another_version_is_malformed():
    for version in (0, 4, 0x0102):
        raw = bytearray(pack(HEADER)[:-4])
        raw[8:10] = version.to_bytes(2, "little")
        assert parse(bytes(raw) + zlib.crc32(raw).to_bytes(4, "little")) is None


def test_the_checksum_is_the_published_one_however_the_payload_is_cut():
    assert checksum([memoryview(PAYLOAD)]) == HEADER.checksum
    assert checksum(VIEWS) == HEADER.checksum
    assert checksum([]) == checksum([memoryview(b"")])


def test_every_flipped_bit_of_a_header_is_malformed():
    raw = pack(HEADER)
    for index in range(HEADER_BYTES):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[index] ^= 1 << bit
            assert parse(bytes(damaged)) is None
            assert verify(bytes(damaged), EXPECTED, VIEWS) is GetOutcome.MALFORMED


@pytest.mark.parametrize("offset", [116, 123])
def test_a_reserved_byte_that_is_set_is_refused_even_under_a_right_crc(offset):
    assert parse(with_byte(pack(HEADER), offset, 1)) is None
    assert parse(with_byte(pack(HEADER), 115, 1)) is not None, "the byte before is of the id of the MAC's secret"


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


def test_a_flipped_payload_byte_is_a_checksum_miss():
    damaged = bytearray(PAYLOAD)
    damaged[200] ^= 1
    assert outcome(payload=bytes(damaged)) is GetOutcome.CHECKSUM
    assert outcome() is GetOutcome.OK


@pytest.mark.parametrize(
    "change",
    [
        {"token_count": 1 << 32},
        {"generation": -1},
        {"payload_length": 1 << 64},
        {"key": b"short"},
        {"owner": b"short"},
        {"nonce": b"short"},
        {"mac": b""},
        {"key_id": b"short"},
    ],
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
