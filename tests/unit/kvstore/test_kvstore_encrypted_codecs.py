"""Chunks that lie encrypted in segments, in tiers with each codec: encrypted once, opened by engines alone."""

from dataclasses import replace

import numpy as np
import pytest
from support.chunk_attacks import CLUSTER, OTHER_CLUSTER, sealed_chunk
from support.tier_rigs import content, room_for

from kvcore.clock import ManualClock
from kvcore.types import ChunkKey, KVSpec, OwnerTag
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, Expected, parse
from kvstore.codecs.frame import FRONT_BYTES, CodecKind, is_whole, parse_frame
from kvstore.codecs.tier import CodecTier
from kvstore.integrity.checks import Integrity
from kvstore.tiers.base import ChunkName, TierChunk, TierOutcome
from kvstore.tiers.memory import MemoryTier
from kvstore.types import GetOutcome

OK, DAMAGED = TierOutcome.OK, TierOutcome.DAMAGED
CALL_S = 20.0
BLOCK, HEADS, CHANNELS, TOKENS = 16, 3, 8, 64
SPEC = KVSpec(
    model_id="m",
    weights_digest="w",
    tokenizer_digest="t",
    num_layers=2,
    num_kv_heads=HEADS,
    head_dim=CHANNELS,
    dtype="float32",
    attention="",
    layout_id=f"paged.L2BHD.b{BLOCK}",
    chunk_tokens=TOKENS,
    chunk_bytes=2 * 2 * HEADS * CHANNELS * TOKENS * 4,
)
TENANT = OwnerTag(b"a tenant")
ENCRYPTED = Integrity("mac", CLUSTER, encrypt=True)
KV = (np.arange(SPEC.chunk_bytes // 4, dtype="<f4") % 97 / 8).tobytes()
NAME = ChunkName(SPEC.fingerprint, ChunkKey(bytes(range(16))))
HEADER = ChunkHeader(NAME.key, NAME.fingerprint, TOKENS, len(KV), 0, 9, TENANT)
EXPECTED = Expected(NAME.key, NAME.fingerprint, 9, len(KV), TENANT)


def encrypted(integrity: Integrity = ENCRYPTED, payload: bytes = KV) -> TierChunk:
    return TierChunk(NAME, [memoryview(bytearray(sealed_chunk(integrity, HEADER, payload)))])


def opened(chunk: TierChunk, by: Integrity = ENCRYPTED) -> bytes:
    """What an engine has of it."""
    whole = memoryview(bytearray(content(chunk)))
    body = whole[HEADER_BYTES:]
    assert by.checking(EXPECTED).outcome(whole[:HEADER_BYTES], [body]) is GetOutcome.OK
    return bytes(body)


@pytest.fixture
async def under():
    tier = MemoryTier(1 << 24, ManualClock())
    yield tier
    await tier.aclose()


def over(under: MemoryTier, codec: str, integrity: Integrity = ENCRYPTED, *, encrypt: bool = False) -> CodecTier:
    tier = CodecTier(under, codec, integrity, encrypt=encrypt)
    tier.use(SPEC)
    return tier


async def saved(tier: CodecTier, chunk: TierChunk) -> TierOutcome:
    return (await tier.save([chunk], timeout_s=CALL_S))[0]


async def loaded(tier: CodecTier, room: TierChunk) -> TierOutcome:
    return (await tier.load([room], timeout_s=CALL_S))[0]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize("codec", ["none", "lossless", "int8"])
async def test_it_lies_there_encrypted_once_and_comes_back_encrypted(under, codec, encrypt, parts):
    tier, chunk = over(under, codec, encrypt=encrypt), encrypted()
    if parts == 2:
        chunk = TierChunk(NAME, [chunk.memory[0][:200], chunk.memory[0][200:]])
    before, back = content(chunk), room_for(chunk)
    assert await saved(tier, chunk) is OK and content(chunk) == before
    value = bytes(under.chunks[NAME][0])
    header, frame = parse(value), parse_frame(value[HEADER_BYTES:FRONT_BYTES])
    assert is_whole(value, len(value)) and KV[:64] not in value
    if codec == "none":
        assert value == before, "as it lies in a segment, and no longer"
    else:
        kind = {"lossless": CodecKind.LOSSLESS, "int8": CodecKind.INT8}[codec]
        assert frame.encrypted and frame.kind == kind and len(value) < len(before) / 2
        assert header.checksum == 0 and not header.encrypted
    assert await loaded(tier, back) is OK
    there = content(back)
    assert parse(there).encrypted and KV[:64] not in there
    if codec == "int8":
        near = np.frombuffer(opened(back), "<f4")
        assert np.allclose(near, np.frombuffer(KV, "<f4"), atol=0.1)
    else:
        assert opened(back) == KV
    assert (parse(there).nonce == parse(before).nonce) is (codec == "none"), "what is encrypted anew has its own nonce"


async def test_what_a_codec_makes_no_smaller_stays_as_it_is(under):
    noise = np.random.default_rng(1).bytes(len(KV))
    tier, chunk = over(under, "lossless"), encrypted(payload=noise)
    assert await saved(tier, chunk) is OK
    assert under.chunks[NAME][0] == content(chunk)
    back = room_for(chunk)
    assert await loaded(tier, back) is OK and opened(back) == noise


async def test_who_cannot_open_it_keeps_it_as_it_is(under):
    chunk = encrypted()
    assert await saved(over(under, "lossless", Integrity()), chunk) is OK
    assert under.chunks[NAME][0] == content(chunk)


@pytest.mark.parametrize("codec", ["lossless", "int8"])
async def test_what_somebody_changed_is_not_saved_and_not_loaded(under, codec):
    tier, chunk = over(under, codec), encrypted()
    chunk.memory[0][HEADER_BYTES + 5] ^= 1
    assert await saved(tier, chunk) is DAMAGED and not under.chunks
    assert await saved(tier, encrypted(Integrity("mac", OTHER_CLUSTER, encrypt=True))) is DAMAGED
    assert await saved(tier, encrypted()) is OK
    value, until = under.chunks[NAME]
    for at in (FRONT_BYTES, FRONT_BYTES + 40, len(value) - 1):
        under.chunks[NAME] = bytes(value[:at]) + bytes([value[at] ^ 1]) + bytes(value[at + 1 :]), until
        assert await loaded(tier, room_for(encrypted())) is DAMAGED


async def test_a_plain_chunk_in_a_frame_is_none_of_a_cluster_that_encrypts(under):
    plain = Integrity("mac", CLUSTER)
    chunk = TierChunk(NAME, [memoryview(bytearray(sealed_chunk(plain, HEADER, KV)))])
    assert await saved(over(under, "lossless", plain), chunk) is OK
    back = room_for(chunk)
    assert await loaded(over(under, "lossless"), back) is DAMAGED and KV[:64] not in content(back)


async def test_a_frame_of_a_cluster_that_encrypts_proves_nothing_to_who_does_not(under):
    """The tier's encryption is that of a cluster with plain segments; the fingerprint keeps the two apart."""
    assert await saved(over(under, "lossless"), encrypted()) is OK
    plain, back = Integrity("mac", CLUSTER), room_for(encrypted())
    assert await loaded(over(under, "lossless", plain), back) is OK
    header = parse(content(back))
    assert plain.check(content(back)[:HEADER_BYTES], EXPECTED, [memoryview(content(back))[HEADER_BYTES:]]) is (
        GetOutcome.UNPROVEN
    )
    assert header == replace(HEADER, checksum=header.checksum)
