"""How chunks are encrypted and opened: the published bytes, and what becomes of every kind of wrong byte."""

import dataclasses
import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.chunk_attacks import with_bytes
from support.sample_chunk import EXPECTED, HEADER, NEW_SECRET, NONCE, OTHER_SECRET, PAYLOAD, SECRET, VIEWS

from kvcore.trust.keys import ClusterKey, KeyLabel
from kvcore.trust.secrets import Secrets
from kvstore.chunk_format import HEADER_BYTES, Expected, checksum, pack, parse
from kvstore.integrity.checks import Checking, Integrity
from kvstore.integrity.cipher import chunk_key
from kvstore.integrity.mac import identity
from kvstore.types import GetOutcome

VECTOR_KEY = "594bdbcd4c5b7df6fda40772798aa7de50c844e3d4985cadd4c5e0d6f9505ae9"
VECTOR_HEADER = (
    "4b56464348554e4b0300800004000000000102030405060708090a0b0c0d0e0f"
    "101112131415161718191a1b1c1d1e1f00010000000000001841316ec6cc9f83"
    "efcdab8967452301a0a1a2a3a4a5a6a7505152535455565758595a5bd43e1197"
    "0a57bba58c1507728e468ef79c8a87ab82a9fbfe00000000000000004081092b"
)
VECTOR_START = "fa5f7d39600a6a5316d15237e2a34af3"


def encrypting(*secrets: bytes) -> Integrity:
    return Integrity("mac", Secrets(secrets or (SECRET,)), lambda count: NONCE[:count], encrypt=True)


def written(by: Integrity | None = None, **changes: object) -> tuple[bytes, bytes]:
    """Header and payload as they lie in a segment."""
    body = memoryview(bytearray(len(PAYLOAD)))
    header = (by or encrypting()).encrypted(dataclasses.replace(HEADER, **changes), VIEWS, body)
    return pack(header), bytes(body)


RAW, BODY = written()


def read(
    raw: bytes = RAW,
    body: bytes = BODY,
    *,
    by: Integrity | None = None,
    expected: Expected = EXPECTED,
    part_bytes: int = 37,
    shown: int = 1 << 20,
) -> tuple[GetOutcome, bytes]:
    """As a reader whose transport shows the first `shown` bytes in parts of so many; and what it then has."""
    checking, came = (by or encrypting()).checking(expected), memoryview(bytearray(raw + body))
    for start in range(0, min(shown, len(came)), part_bytes):
        checking.show(came[start : min(shown, start + part_bytes)])
    header, payload = came[:HEADER_BYTES], came[HEADER_BYTES:]
    return checking.outcome(header, [payload[:50], payload[50:]]), bytes(payload)


def outcome(raw: bytes = RAW, body: bytes = BODY, **how: object) -> GetOutcome:
    """All three kinds of reader say the same, and who only looks leaves all as it is."""
    found, after = read(raw, body, **how)
    assert (found is GetOutcome.OK) == (after == PAYLOAD)
    assert read(raw, body, shown=0, **how)[0] is found
    lies = bytearray(body)
    expected = how.get("expected", EXPECTED)
    assert (how.get("by") or encrypting()).check(raw, expected, [memoryview(lies)]) is found
    assert lies == body
    return found


# --- what is published ---


def test_the_published_vector_holds():
    tenant = ClusterKey(SECRET).derive(KeyLabel.CHUNKS, b"encrypt chunk" + HEADER.owner)
    key = chunk_key(ClusterKey(SECRET), HEADER)
    assert key == hmac.digest(tenant, HEADER.key + HEADER.fingerprint, hashlib.sha256)
    assert key.hex() == VECTOR_KEY
    header = parse(RAW)
    assert BODY + header.mac == AESGCM(key).encrypt(NONCE, PAYLOAD, identity(header))
    assert (RAW.hex(), BODY[:16].hex()) == (VECTOR_HEADER, VECTOR_START)
    assert header.checksum == checksum([memoryview(BODY)]), "who holds no secret can look for damage"


@pytest.mark.parametrize("field", ["key", "fingerprint", "owner", "key_id"])
def test_each_chunk_and_tenant_has_a_key_of_its_own(field):
    if field == "key_id":
        assert chunk_key(ClusterKey(SECRET), HEADER) != chunk_key(ClusterKey(NEW_SECRET), HEADER)
        return
    other = dataclasses.replace(HEADER, **{field: bytes(len(getattr(HEADER, field)))})
    assert chunk_key(ClusterKey(SECRET), HEADER) != chunk_key(ClusterKey(SECRET), other)


def test_nothing_of_the_payload_is_in_what_lies_there():
    assert all(PAYLOAD[at : at + 4] not in BODY for at in range(len(PAYLOAD) - 4))


def test_nonces_are_drawn_anew_each_time_the_same_chunk_is_written():
    integrity = Integrity("mac", Secrets((SECRET,)), encrypt=True)
    twice = [written(integrity) for _ in range(100)]
    assert len({parse(raw).nonce for raw, _ in twice}) == len({body for _, body in twice}) == 100


def test_what_is_encrypted_is_proved_and_has_a_secret():
    with pytest.raises(ValueError, match="proved"):
        Integrity("checksum", Secrets((SECRET,)), encrypt=True)
    with pytest.raises(ValueError, match="secret"):
        Integrity("mac", encrypt=True)


@pytest.mark.parametrize(("payload", "room"), [(PAYLOAD[:-1], 256), (PAYLOAD, 255), (PAYLOAD, 257)])
def test_a_payload_or_room_of_another_length_is_the_callers_mistake(payload, room):
    with pytest.raises(ValueError, match="256 bytes"):
        encrypting().encrypted(HEADER, [memoryview(payload)], memoryview(bytearray(room)))


# --- what is read ---


@pytest.mark.parametrize("part_bytes", [1, 16, 100, HEADER_BYTES, HEADER_BYTES + 256])
@pytest.mark.parametrize("shown", [0, 1, HEADER_BYTES, HEADER_BYTES + 49, HEADER_BYTES + 51, HEADER_BYTES + 256])
def test_it_is_opened_once_however_much_of_it_was_shown(part_bytes, shown):
    assert read(part_bytes=part_bytes, shown=shown) == (GetOutcome.OK, PAYLOAD)


def test_parts_and_views_of_any_length_open_alike():
    size = (1 << 20) + 12_345  # several parts of the cipher's own, the last one short
    payload = memoryview(bytes(range(256)) * (size // 256 + 1))[:size]
    body = memoryview(bytearray(size))
    header = encrypting().encrypted(
        dataclasses.replace(HEADER, payload_length=size), [payload[:777_777], payload[777_777:]], body
    )
    expected = dataclasses.replace(EXPECTED, payload_length=size)
    assert encrypting().check(pack(header), expected, [body]) is GetOutcome.OK
    views = [body[:400_000], body[400_000:]]
    assert encrypting().checking(expected).outcome(pack(header), views) is GetOutcome.OK
    assert body == payload


def test_typed_buffers_of_several_dimensions_are_flat_bytes():
    came = memoryview(bytearray(BODY)).cast("I").cast("B").cast("f", (8, 8))
    assert encrypting().checking(EXPECTED).outcome(RAW, [came]) is GetOutcome.OK
    assert came.cast("B") == PAYLOAD


def test_what_came_twice_on_its_way_is_a_miss():
    checking, came = encrypting().checking(EXPECTED), memoryview(bytearray(RAW + BODY))
    checking.show(came)
    came[HEADER_BYTES:] = BODY
    checking.show(came[HEADER_BYTES:])
    assert checking.outcome(came[:HEADER_BYTES], [came[HEADER_BYTES:]]) is GetOutcome.CHECKSUM


def test_a_header_that_changed_after_parts_were_opened_is_a_miss():
    forged = with_bytes(RAW, 92, bytes(16))
    for first, then in ((RAW, forged), (forged, RAW)):
        checking, came = encrypting().checking(EXPECTED), memoryview(bytearray(first + BODY))
        checking.show(came)
        assert checking.outcome(then, [came[HEADER_BYTES:]]) is GetOutcome.CHECKSUM


def test_a_chunk_that_is_copied_is_the_same_under_another_generation():
    moved = pack(dataclasses.replace(parse(RAW), generation=7))
    assert outcome(moved, expected=dataclasses.replace(EXPECTED, generation=7)) is GetOutcome.OK


def test_into_memory_of_ones_own_it_opens_too_and_tells_wrong_bytes():
    into = memoryview(bytearray(len(BODY)))
    assert encrypting().open(parse(RAW), memoryview(BODY), into) and into == PAYLOAD
    assert not encrypting().open(parse(RAW), memoryview(b"?" + BODY[1:]), into)
    assert not encrypting(OTHER_SECRET).open(parse(RAW), memoryview(BODY), into)
    assert not encrypting().open(HEADER, memoryview(BODY), into)


# --- damage and forgery ---

_FIELDS = {
    "token count": (12, 16, GetOutcome.FORGED),
    "key": (16, 32, GetOutcome.STALE),
    "fingerprint": (32, 48, GetOutcome.FOREIGN),
    "payload length": (48, 56, GetOutcome.MALFORMED),
    "generation": (64, 72, GetOutcome.STALE),
    "owner": (72, 80, GetOutcome.FOREIGN),
    "nonce": (80, 92, GetOutcome.FORGED),
    "tag": (92, 108, GetOutcome.FORGED),
    "key id": (108, 116, GetOutcome.UNPROVEN),
    "reserved": (116, 124, GetOutcome.MALFORMED),
}


@pytest.mark.parametrize("field", _FIELDS)
def test_every_changed_byte_of_a_header_under_a_right_crc_is_refused(field):
    first, end, found = _FIELDS[field]
    for offset in range(first, end):
        assert outcome(with_bytes(RAW, offset, bytes([RAW[offset] ^ 0x40]))) is found, offset


@pytest.mark.parametrize("offset", [0, 15, 16, 63, 64, 100, 255])
def test_a_changed_byte_is_damage_and_with_a_new_checksum_a_forgery(offset):
    damaged = bytearray(BODY)
    damaged[offset] ^= 1
    assert outcome(RAW, bytes(damaged)) is GetOutcome.CHECKSUM
    forged = with_bytes(RAW, 56, checksum([memoryview(damaged)]).to_bytes(8, "little"))
    assert outcome(forged, bytes(damaged)) is GetOutcome.FORGED


@pytest.mark.parametrize("field", ["key", "fingerprint", "owner"])
def test_a_chunk_that_is_made_to_look_like_another_is_a_forgery(field):
    first, end, _ = _FIELDS[field]
    renamed = with_bytes(RAW, first, bytes(end - first))
    header = parse(renamed)
    wanted = Expected(header.key, header.fingerprint, header.generation, 256, header.owner)
    assert outcome(renamed, expected=wanted) is GetOutcome.FORGED


def test_half_a_chunk_under_its_true_header_is_damage():
    assert outcome(RAW, BODY[:128] + bytes(128)) is GetOutcome.CHECKSUM


# --- who does not encrypt, and who does ---


@pytest.mark.parametrize("verify", ["header", "checksum", "mac"])
@pytest.mark.parametrize("secret", [SECRET, OTHER_SECRET])
def test_who_does_not_encrypt_never_takes_what_is_encrypted_for_kv(verify, secret):
    plain = Integrity(verify, Secrets((secret,)))
    assert read(by=plain)[0] is GetOutcome.UNPROVEN
    assert plain.check(RAW, EXPECTED, [memoryview(BODY)]) is GetOutcome.UNPROVEN
    as_if_plain = with_bytes(RAW, 8, (2).to_bytes(2, "little"))
    if verify == "mac":
        assert read(as_if_plain, by=plain)[0] in (GetOutcome.FORGED, GetOutcome.UNPROVEN)


def test_who_encrypts_takes_nothing_plain_not_even_what_the_secret_proves():
    plain = Integrity("mac", Secrets((SECRET,)))
    raw = pack(plain.seal(HEADER, VIEWS))
    assert plain.check(raw, EXPECTED, VIEWS) is GetOutcome.OK
    for shown in (0, 1 << 20):
        assert read(raw, PAYLOAD, shown=shown)[0] is GetOutcome.UNPROVEN
    assert read(pack(Integrity().seal(HEADER, VIEWS)), PAYLOAD)[0] is GetOutcome.UNPROVEN
    assert read(raw, b"?" + PAYLOAD[1:])[0] is GetOutcome.CHECKSUM
    assert read(with_bytes(raw, 8, (3).to_bytes(2, "little")), PAYLOAD)[0] is GetOutcome.FORGED


def test_while_the_secret_is_changed_both_open_and_the_first_encrypts():
    both = encrypting(NEW_SECRET, SECRET)
    assert outcome(by=both) is GetOutcome.OK
    raw, body = written(both)
    assert outcome(raw, body, by=encrypting(NEW_SECRET)) is GetOutcome.OK
    assert outcome(raw, body) is GetOutcome.UNPROVEN, "a reader that has not the new one yet"


def test_a_chunk_of_another_cluster_is_not_opened():
    raw, body = written(encrypting(OTHER_SECRET))
    assert outcome(raw, body) is GetOutcome.UNPROVEN


def test_a_reader_that_looks_only_is_made_of_the_same_checks():
    looking = Checking(encrypting(), EXPECTED, opens=False)
    came = memoryview(bytearray(RAW + BODY))
    looking.show(came)
    assert looking.outcome(RAW, [came[HEADER_BYTES:]]) is GetOutcome.OK and came[HEADER_BYTES:] == BODY
