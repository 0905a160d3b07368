"""Chunks that are encrypted for a tier: the published bytes, what hides in them, and what becomes of changed ones."""

import zlib
from dataclasses import replace
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.tier_rigs import chunk_of, content, name_of, room_for

from kvcore.clock import ManualClock
from kvcore.trust.keys import ClusterKey, KeyLabel
from kvcore.trust.secrets import Secrets
from kvcore.types import OwnerTag
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, Expected, pack, parse
from kvstore.codecs.cipher import encrypted
from kvstore.codecs.frame import ENCRYPTION_BYTES, FRONT_BYTES, MORE_BYTES, CodecKind, Frame, parse_frame
from kvstore.codecs.tier import CodecTier
from kvstore.integrity.checks import Integrity
from kvstore.integrity.mac import identity
from kvstore.tiers.base import ChunkName, TierChunk, TierOutcome
from kvstore.tiers.memory import MemoryTier
from kvstore.types import GetOutcome

OK, MISSING, DAMAGED = TierOutcome.OK, TierOutcome.MISSING, TierOutcome.DAMAGED
CALL_S = 20.0
SECRET, NEW_SECRET = bytes(range(32)), bytes(range(32, 64))
NONCE = bytes(range(0x60, 0x6C))
PAYLOAD = bytes(range(256))
TENANT, OTHER_TENANT = OwnerTag(bytes(range(0xA0, 0xA8))), OwnerTag(b"somebody")
NAME = ChunkName(bytes(range(16, 32)), bytes(range(16)))  # type: ignore[arg-type]
HEADER = ChunkHeader(
    key=NAME.key,
    fingerprint=NAME.fingerprint,
    token_count=4,
    payload_length=256,
    checksum=0x9408A4433B952D71,
    generation=0x0123456789ABCDEF,
    owner=TENANT,
)


def integrity(*secrets: bytes) -> Integrity:
    return Integrity("mac", Secrets(secrets or (SECRET,)))


def sealed(payload: bytes = PAYLOAD, owner: OwnerTag = TENANT, name: ChunkName = NAME) -> TierChunk:
    """A chunk as it lies in a segment of a cluster with a secret."""
    header = replace(
        HEADER, key=name.key, fingerprint=name.fingerprint, owner=owner, payload_length=len(payload), checksum=0
    )
    header = integrity().seal(header, [memoryview(payload)])
    return TierChunk(name, [memoryview(bytearray(pack(header) + payload))])


@pytest.fixture
async def under():
    tier = MemoryTier(64 << 20, ManualClock())
    yield tier
    await tier.aclose()


def over(tier: MemoryTier, *secrets: bytes, codec: str = "none", encrypt: bool = True) -> CodecTier:
    return CodecTier(tier, codec, integrity(*secrets), encrypt=encrypt)


async def save_one(tier: CodecTier, chunk: TierChunk) -> TierOutcome:
    (outcome,) = await tier.save([chunk], timeout_s=CALL_S)
    return outcome


async def load_one(tier: CodecTier, room: TierChunk) -> TierOutcome:
    (outcome,) = await tier.load([room], timeout_s=CALL_S)
    return outcome


def test_an_encrypted_chunk_as_it_is_published():
    one = Integrity(secrets=Secrets((SECRET,)), draw=lambda count: NONCE[:count])
    value = bytes(encrypted(one, HEADER, Frame(CodecKind.NONE, 1, 0), memoryview(PAYLOAD)))
    assert value[:FRONT_BYTES].hex() == (
        "4b56464348554e4b0200800004000000000102030405060708090a0b0c0d0e0f"
        "101112131415161718191a1b1c1d1e1f00010000000000000000000000000000"
        "efcdab8967452301a0a1a2a3a4a5a6a700000000000000000000000000000000"
        "0000000000000000000000000000000000000000000000000000000076181c67"
        "4b5646434f444543020040000000010018010000000000009c8a87ab82a9fbfe"
        "606162636465666768696a6b0000000000000000000000000000000070dddf0d"
    )
    assert sha256(value).hexdigest() == "7d60da3d8b086f8ffb2532a8467a6f3004174a13794857a4db01b85a54547f49"
    key = ClusterKey(SECRET).derive(KeyLabel.CHUNKS, b"encrypt" + TENANT)
    beside = identity(HEADER) + value[HEADER_BYTES:FRONT_BYTES]
    plain = AESGCM(key).decrypt(NONCE, value[FRONT_BYTES:], beside)
    assert plain == HEADER.checksum.to_bytes(8, "little") + PAYLOAD


async def test_what_lies_in_the_tier_tells_nothing_of_the_payload(under):
    tier, chunk = over(under), sealed(bytes(1000))
    assert await save_one(tier, chunk) is OK
    ((value, _),) = under.chunks.values()
    header = parse(chunk.header())
    assert bytes(16) not in value[FRONT_BYTES:] and len(value) == chunk.num_bytes + MORE_BYTES
    assert header.checksum.to_bytes(8, "little") not in value and parse(value) == replace(header, checksum=0)
    await tier.remove([chunk.name], timeout_s=CALL_S)
    assert await save_one(tier, chunk) is OK
    assert under.chunks[chunk.name][0][FRONT_BYTES:] != value[FRONT_BYTES:], "with another nonce"
    await tier.aclose()


@pytest.mark.parametrize("codec", ["none", "lossless"])
@pytest.mark.parametrize("size", [1, 16, 255, 4096, 300_000, (1 << 20) + 1])
async def test_it_comes_back_as_it_was_and_is_proved_to_its_reader(under, codec, size):
    name = name_of(size)
    tier, chunk = over(under, codec=codec), sealed(content(chunk_of(name, size))[HEADER_BYTES:], name=name)
    back = room_for(chunk)
    assert (await save_one(tier, chunk), await load_one(tier, back)) == (OK, OK)
    assert content(back) == content(chunk)
    header = parse(back.header())
    expected = Expected(name.key, name.fingerprint, header.generation, size, TENANT)
    assert integrity().check(back.header(), expected, [back.memory[0][HEADER_BYTES:]]) is GetOutcome.OK
    frame = parse_frame(under.chunks[name][0][HEADER_BYTES:])
    assert frame.encrypted
    if size >= 4096:
        assert (frame.kind, len(under.chunks[name][0]) < chunk.num_bytes) == (
            (CodecKind.LOSSLESS, True) if codec == "lossless" else (CodecKind.NONE, False)
        )
    await tier.aclose()


async def test_a_tier_that_encrypts_no_longer_or_not_yet_reads_what_is_there(under):
    encrypting, plain = over(under), over(under, encrypt=False)
    chunks = [sealed(bytes(1000), name=name_of(number)) for number in range(2)]
    assert (await save_one(encrypting, chunks[0]), await save_one(plain, chunks[1])) == (OK, OK)
    for tier in (encrypting, plain):
        backs = [room_for(chunk) for chunk in chunks]
        assert await tier.load(backs, timeout_s=CALL_S) == [OK, OK]
        assert [content(back) for back in backs] == [content(chunk) for chunk in chunks]
        await tier._pool.aclose()


async def test_what_is_encrypted_without_a_codec_is_loaded_by_one_call_of_the_tier(under, monkeypatch):
    tier, chunk = over(under), sealed()
    await save_one(tier, chunk)
    monkeypatch.setattr(under, "sizes", None)
    back = room_for(chunk)
    assert await load_one(tier, back) is OK and content(back) == content(chunk)
    await tier.aclose()


async def test_every_changed_byte_is_damage(under):
    tier, chunk = over(under), sealed()
    await save_one(tier, chunk)
    value, end = under.chunks[NAME]
    for at in [*range(FRONT_BYTES), *range(FRONT_BYTES, len(value), 7), *range(len(value) - 16, len(value))]:
        under.chunks[NAME] = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :], end
        assert await load_one(tier, room_for(chunk)) is DAMAGED, at
    await tier.aclose()


def with_bytes(value: bytes, start: int, at: int, new: bytes) -> bytes:
    """Bytes of the header (`start` 0, 128 long) or frame (128, 64 long) replaced, its CRC made right."""
    length = HEADER_BYTES if start == 0 else FRONT_BYTES - HEADER_BYTES
    body = bytearray(value[start : start + length - 4])
    body[at : at + len(new)] = new
    return value[:start] + bytes(body) + zlib.crc32(body).to_bytes(4, "little") + value[start + length :]


@pytest.mark.parametrize(
    ("start", "at", "new"),
    [
        (0, 12, b"\x05"),  # token count
        (0, 16, bytes(16)),  # key
        (0, 32, bytes(16)),  # fingerprint
        (0, 72, OTHER_TENANT),
        (HEADER_BYTES, 14, b"\x02"),  # bytes of a number
        (HEADER_BYTES, 24, bytes([1] * 8)),  # secret
        (HEADER_BYTES, 32, bytes(12)),  # nonce
    ],
)
async def test_what_header_and_frame_say_is_part_of_it(under, start, at, new):
    tier, chunk = over(under), sealed()
    await save_one(tier, chunk)
    value, end = under.chunks[NAME]
    under.chunks[NAME] = with_bytes(value, start, at, new), end
    assert await load_one(tier, room_for(chunk)) is DAMAGED
    await tier.aclose()


async def test_its_generation_may_change_as_that_of_any_copy(under):
    tier, chunk = over(under), sealed()
    await save_one(tier, chunk)
    value, end = under.chunks[NAME]
    under.chunks[NAME] = with_bytes(value, 0, 64, bytes(8)), end
    back = room_for(chunk)
    assert await load_one(tier, back) is OK and parse(back.header()).generation == 0
    await tier.aclose()


async def test_another_chunks_body_does_not_fit_its_header(under):
    tier, mine, others = over(under), sealed(), sealed(owner=OTHER_TENANT, name=name_of(1))
    assert await tier.save([mine, others], timeout_s=CALL_S) == [OK, OK]
    (value, end), (other, _) = under.chunks[NAME], under.chunks[name_of(1)]
    under.chunks[NAME] = value[:HEADER_BYTES] + other[HEADER_BYTES:], end
    assert await load_one(tier, room_for(mine)) is DAMAGED
    await tier.aclose()


async def test_while_the_secret_is_changed_both_are_read_and_the_first_one_encrypts(under):
    old, both, new = over(under), over(under, NEW_SECRET, SECRET), over(under, NEW_SECRET)
    first, second = sealed(name=name_of(1)), sealed(name=name_of(2))
    assert (await save_one(old, first), await save_one(both, second)) == (OK, OK)
    backs = [room_for(first), room_for(second)]
    assert await both.load(backs, timeout_s=CALL_S) == [OK, OK]
    assert await new.load(backs, timeout_s=CALL_S) == [DAMAGED, OK], "it is removed, so that it can be saved again"
    stranger = CodecTier(under)
    assert await stranger.load(backs, timeout_s=CALL_S) == [MISSING, MISSING], "not for who has no secret to remove"
    for tier in (old, both, new, stranger):
        await tier._pool.aclose()


async def test_what_is_no_whole_chunk_is_not_saved_readable_for_want_of_better(under):
    tier, chunk = over(under), sealed()
    chunk.memory[0][20] ^= 1
    assert await save_one(tier, chunk) is DAMAGED and not under.chunks
    await tier.aclose()


async def test_a_chunk_that_would_be_as_long_as_a_plain_one_is_encrypted_without_its_codec(under, monkeypatch):
    tier, chunk = over(under, codec="lossless"), sealed(bytes(1000))
    fitting = chunk.num_bytes - FRONT_BYTES - ENCRYPTION_BYTES
    monkeypatch.setattr(tier._coder._lossless, "encode", lambda *_: bytes(fitting))
    assert await save_one(tier, chunk) is OK
    assert parse_frame(under.chunks[NAME][0][HEADER_BYTES:]).kind == CodecKind.NONE
    back = room_for(chunk)
    assert await load_one(tier, back) is OK and content(back) == content(chunk)
    await tier.aclose()


async def test_room_is_left_for_what_encryption_adds(under):
    small = MemoryTier(1 << 20, ManualClock(), max_chunk_bytes=1000)
    tier = over(small)
    fits, too_large = (sealed(bytes(size - HEADER_BYTES), name=name_of(size)) for size in (912, 913))
    assert tier.max_chunk_bytes == 912
    assert await tier.save([fits, too_large], timeout_s=CALL_S) == [OK, TierOutcome.TOO_LARGE]
    await tier.aclose()
