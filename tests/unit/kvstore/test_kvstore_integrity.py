"""How chunks are sealed and checked: the published MAC, and what becomes of every kind of wrong byte."""

import dataclasses
import zlib

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.chunk_attacks import with_bytes
from support.sample_chunk import EXPECTED, HEADER, NEW_SECRET, NONCE, OTHER_SECRET, PAYLOAD, SECRET, VIEWS

from kvcore.trust.secrets import Secrets
from kvcore.types import ChunkKey, OwnerTag
from kvstore.chunk_format import HEADER_BYTES, Expected, checksum, pack, parse
from kvstore.integrity.checks import Integrity
from kvstore.integrity.mac import identity, mac_of
from kvstore.types import GetOutcome

VECTOR_MAC = "2f24835d990923ef3a2b55f28216a293"
VECTOR_HEADER = (
    "4b56464348554e4b0200800004000000000102030405060708090a0b0c0d0e0f"
    "101112131415161718191a1b1c1d1e1f0001000000000000712d953b43a40894"
    "efcdab8967452301a0a1a2a3a4a5a6a7505152535455565758595a5b79cb6ee6"
    "26e5b58dc01ed31551afc0919c8a87ab82a9fbfe00000000000000000028fe79"
)


def macs(*secrets: bytes) -> Integrity:
    return Integrity("mac", Secrets(secrets or (SECRET,)), lambda count: NONCE[:count])


def sealed(integrity: Integrity | None = None, **changes: object) -> bytes:
    """The header of the chunk as it is written."""
    header = dataclasses.replace(HEADER, **changes)
    return pack((integrity or macs()).seal(header, VIEWS))


def check(
    raw: bytes, payload: bytes = PAYLOAD, *, by: Integrity | None = None, expected: Expected = EXPECTED
) -> GetOutcome:
    """As a reader that got all in one piece, and as one that was shown it on the way: both say the same."""
    by = by or macs()
    checking, whole = by.checking(expected), memoryview(raw + payload)
    for start in range(0, len(whole), 37):
        checking.show(whole[start : start + 37])
    shown = checking.outcome(raw, [memoryview(payload)])
    assert by.check(raw, expected, [memoryview(payload)]) is shown
    return shown


def test_the_published_mac_vector_holds():
    key = bytes(range(32))
    header = dataclasses.replace(HEADER, nonce=NONCE)
    assert mac_of(key, header, VIEWS).hex() == VECTOR_MAC
    other = AESGCM(key).encrypt(NONCE, b"", identity(header) + PAYLOAD)
    assert other.hex() == VECTOR_MAC, "it is GMAC: AES-GCM of no text, with identity and payload beside it"


def test_the_published_header_with_a_mac_holds():
    assert sealed().hex() == VECTOR_HEADER
    assert parse(sealed()) == macs().seal(HEADER, VIEWS)
    assert check(sealed()) is GetOutcome.OK


def test_without_secrets_there_are_no_macs():
    with pytest.raises(ValueError):
        Integrity("mac")


def test_nonces_are_drawn_anew_for_each_chunk():
    integrity = Integrity("mac", Secrets((SECRET,)))
    drawn = {integrity.seal(HEADER, VIEWS).nonce for _ in range(100)}
    assert len(drawn) == 100 and all(len(nonce) == 12 for nonce in drawn)


def test_a_payload_of_another_length_is_not_sealed():
    with pytest.raises(ValueError):
        macs().seal(HEADER, VIEWS[:1])
    sealing = macs().sealing(HEADER)
    sealing.show(memoryview(bytes(HEADER_BYTES) + PAYLOAD[:-1]))
    assert sealing.header() is None


@pytest.mark.parametrize("size", [1, 100, HEADER_BYTES, HEADER_BYTES + 256])
@pytest.mark.parametrize("verify", ["checksum", "mac"])
def test_the_seal_is_the_same_however_header_and_payload_pass(size, verify):
    integrity = dataclasses.replace(macs(), verify=verify)
    sealing, whole = integrity.sealing(HEADER), memoryview(pack(HEADER) + PAYLOAD)
    for start in range(0, len(whole), size):
        sealing.show(whole[start : start + size])
    assert sealing.header() == integrity.seal(HEADER, VIEWS)


def test_a_chunk_that_was_not_shown_whole_is_gone_over_again():
    checking = macs().checking(EXPECTED)
    checking.show(memoryview(sealed() + PAYLOAD)[:-1])
    assert not checking.done
    assert checking.outcome(sealed(), VIEWS) is GetOutcome.OK


def test_a_header_that_changed_after_it_was_shown_is_the_one_that_counts():
    checking, forged = macs().checking(EXPECTED), with_bytes(sealed(), 92, bytes(16))
    checking.show(memoryview(sealed() + PAYLOAD))
    assert checking.outcome(forged, VIEWS) is GetOutcome.FORGED
    checking = macs().checking(EXPECTED)
    checking.show(memoryview(forged + PAYLOAD))
    assert checking.outcome(sealed(), VIEWS) is GetOutcome.OK


def test_a_chunk_that_is_copied_keeps_its_mac_under_another_generation():
    moved = pack(dataclasses.replace(macs().seal(HEADER, VIEWS), generation=7))
    assert check(moved, expected=dataclasses.replace(EXPECTED, generation=7)) is GetOutcome.OK


# --- damage and forgery ---

_FIELDS = {
    "token count": (12, 16),
    "key": (16, 32),
    "fingerprint": (32, 48),
    "payload length": (48, 56),
    "checksum": (56, 64),
    "generation": (64, 72),
    "owner": (72, 80),
    "nonce": (80, 92),
    "mac": (92, 108),
    "key id": (108, 116),
}
_SAID_BY_THE_HEADER = {
    "key": GetOutcome.STALE,
    "generation": GetOutcome.STALE,
    "fingerprint": GetOutcome.FOREIGN,
    "owner": GetOutcome.FOREIGN,
    "payload length": GetOutcome.MALFORMED,
    "key id": GetOutcome.UNPROVEN,
}
"""The others of `_FIELDS` only the MAC tells."""


@pytest.mark.parametrize("field", _FIELDS)
def test_every_changed_byte_of_a_header_under_a_right_crc_is_refused(field):
    raw, (first, end) = sealed(), _FIELDS[field]
    for offset in range(first, end):
        changed = with_bytes(raw, offset, bytes([raw[offset] ^ 0x40]))
        if field == "checksum":  # a MAC needs none; it says what became of the bytes where the MAC is wrong
            assert check(changed) is GetOutcome.OK
        else:
            assert check(changed) is _SAID_BY_THE_HEADER.get(field, GetOutcome.FORGED), offset


@pytest.mark.parametrize("field", ["key", "fingerprint", "owner", "token count"])
def test_what_names_a_chunk_is_under_its_mac_and_the_generation_is_not(field):
    """As the header says something else that its reader wants."""
    raw, (first, end) = sealed(), _FIELDS[field]
    changed = with_bytes(raw, first, bytes(byte ^ 1 for byte in raw[first:end]))
    header = parse(changed)
    wanted = Expected(header.key, header.fingerprint, header.generation, 256, header.owner)
    assert check(changed, expected=wanted) is GetOutcome.FORGED


def test_a_payload_that_is_cut_off_is_refused_even_if_its_reader_wants_so_few_bytes():
    cut = with_bytes(sealed(), 48, (255).to_bytes(8, "little"))
    cut = with_bytes(cut, 56, checksum([memoryview(PAYLOAD[:-1])]).to_bytes(8, "little"))
    expected = dataclasses.replace(EXPECTED, payload_length=255)
    assert check(cut, PAYLOAD[:-1], expected=expected) is GetOutcome.FORGED
    assert check(cut, PAYLOAD[:-1], expected=expected, by=Integrity()) is GetOutcome.OK


@pytest.mark.parametrize("offset", [*range(12), *range(116, 124)])
def test_what_is_the_same_in_each_header_is_malformed_if_it_is_not(offset):
    raw = sealed()
    assert check(with_bytes(raw, offset, bytes([raw[offset] ^ 4]))) is GetOutcome.MALFORMED


def test_every_changed_byte_of_a_header_without_a_right_crc_is_malformed():
    for offset in range(HEADER_BYTES):
        raw = bytearray(sealed())
        raw[offset] ^= 1
        assert check(bytes(raw)) is GetOutcome.MALFORMED


@pytest.mark.parametrize("offset", [*range(8), 15, 16, 63, 64, 99, 100, 128, 254, 255])
def test_a_changed_payload_byte_is_damage_and_with_a_new_checksum_a_forgery(offset):
    damaged = bytearray(PAYLOAD)
    damaged[offset] ^= 1
    payload = bytes(damaged)
    assert check(sealed(), payload) is GetOutcome.CHECKSUM
    forged = with_bytes(sealed(), 56, checksum([memoryview(payload)]).to_bytes(8, "little"))
    assert check(forged, payload) is GetOutcome.FORGED
    assert check(forged, payload, by=Integrity()) is GetOutcome.OK, "a checksum anybody can compute"


def test_a_chunk_under_another_key_is_refused_whatever_its_header_is_made_to_say():
    wanted = dataclasses.replace(EXPECTED, key=ChunkKey(bytes(16)))
    replayed = with_bytes(sealed(), 16, wanted.key)
    assert check(replayed, expected=wanted) is GetOutcome.FORGED
    assert check(replayed, expected=wanted, by=Integrity()) is GetOutcome.OK


def test_another_tenants_chunk_is_refused_as_it_is_and_with_its_owner_renamed():
    others = sealed(owner=OwnerTag(b"somebody"))
    assert check(others) is GetOutcome.FOREIGN
    assert check(with_bytes(others, 72, HEADER.owner)) is GetOutcome.FORGED
    assert check(others, expected=dataclasses.replace(EXPECTED, owner=None)) is GetOutcome.OK, "who asks for none"


def test_a_mac_made_of_anothers_chunk_does_not_fit():
    raw = sealed()
    other = sealed(key=ChunkKey(bytes(16)))
    assert check(with_bytes(raw, 80, other[80:116])) is GetOutcome.FORGED


@pytest.mark.parametrize("mac", [bytes(16), b"\xff" * 16])
def test_a_mac_of_a_guess_does_not_fit(mac):
    assert check(with_bytes(sealed(), 92, mac)) is GetOutcome.FORGED


def test_a_chunk_without_a_mac_or_under_another_clusters_secret_proves_nothing():
    assert check(sealed(Integrity())) is GetOutcome.UNPROVEN
    assert check(sealed(macs(OTHER_SECRET))) is GetOutcome.UNPROVEN


def test_a_chunk_without_a_mac_that_is_damaged_or_half_written_is_no_more_than_that():
    assert check(sealed(Integrity()), PAYLOAD[:-1] + b"?") is GetOutcome.CHECKSUM
    assert check(pack(HEADER)) is GetOutcome.CHECKSUM, "its checksum is 0 while it is written"


def test_a_chunk_of_version_1_proves_nothing_and_has_its_checksum():
    plain = bytearray(sealed(Integrity(), owner=None)[:-4])
    plain[8:10] = (1).to_bytes(2, "little")
    raw = bytes(plain) + zlib.crc32(plain).to_bytes(4, "little")
    expected = dataclasses.replace(EXPECTED, owner=None)
    assert check(raw, expected=expected) is GetOutcome.UNPROVEN
    assert check(raw, expected=expected, by=Integrity()) is GetOutcome.OK


# --- two secrets at a time ---


def test_while_the_secret_is_changed_both_are_accepted_and_the_first_signs():
    both = macs(NEW_SECRET, SECRET)
    assert check(sealed(), by=both) is GetOutcome.OK
    assert check(sealed(both), by=both) is GetOutcome.OK
    assert check(sealed(both), by=macs(NEW_SECRET)) is GetOutcome.OK
    assert check(sealed(both)) is GetOutcome.UNPROVEN, "a reader that has not the new one yet"


def test_a_reader_that_meets_an_unknown_secret_looks_whether_there_is_a_new_one():
    file = [(SECRET,)]
    secrets = Secrets((SECRET,), reread=lambda: file.pop() if file else None)
    reader = Integrity("mac", secrets)
    raw = sealed(macs(NEW_SECRET))
    assert check(raw, by=reader) is GetOutcome.UNPROVEN
    file.append((NEW_SECRET, SECRET))
    assert check(raw, by=reader) is GetOutcome.OK
    assert check(sealed(), by=reader) is GetOutcome.OK


def test_with_checksums_alone_a_mac_is_neither_made_nor_looked_at():
    plain = dataclasses.replace(macs(), verify="checksum")
    assert parse(sealed(plain)).mac == bytes(16)
    assert check(with_bytes(sealed(), 92, bytes(16)), by=plain) is GetOutcome.OK
    assert check(sealed(), PAYLOAD[:-1] + b"?", by=plain) is GetOutcome.CHECKSUM


def test_with_headers_alone_the_payload_is_not_looked_at():
    assert check(sealed(), bytes(256), by=Integrity("header")) is GetOutcome.OK
    assert check(with_bytes(sealed(), 16, bytes(16)), by=Integrity("header")) is GetOutcome.STALE
