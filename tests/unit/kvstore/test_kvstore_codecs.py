"""Codecs: what they decode to, what hostile bytes do to them, and a tier over another that encodes."""

import asyncio
import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from support.tier_rigs import chunk_of, content, name_of, room_for

from kvcore.clock import ManualClock
from kvcore.errors import ConfigError
from kvcore.types import ChunkKey, KVSpec
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack, parse
from kvstore.codecs import int8, lossless
from kvstore.codecs.frame import FRAME_BYTES, FRONT_BYTES, Frame, is_whole, pack_frame, parse_frame
from kvstore.codecs.layout import ITEM_BYTES, KVLayout, UnknownLayoutError, kv_layout
from kvstore.codecs.tier import CodecTier
from kvstore.tiers.base import ChunkName, TierChunk, TierOutcome
from kvstore.tiers.memory import MemoryTier

OK, MISSING, DAMAGED, TOO_LARGE = TierOutcome.OK, TierOutcome.MISSING, TierOutcome.DAMAGED, TierOutcome.TOO_LARGE
CALL_S = 20.0
LAYERS, BLOCK, HEADS, CHANNELS = 2, 16, 3, 8


def spec_of(dtype: str = "bfloat16", layout: str = f"paged.L2BHD.b{BLOCK}", chunk_tokens: int = 80) -> KVSpec:
    return KVSpec(
        model_id="m",
        weights_digest="w",
        tokenizer_digest="t",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=CHANNELS,
        dtype=dtype,
        attention="",
        layout_id=layout,
        chunk_tokens=chunk_tokens,
        chunk_bytes=LAYERS * 2 * HEADS * CHANNELS * chunk_tokens * ITEM_BYTES.get(dtype, 1),
    )


def payload_of(spec: KVSpec, seed: int = 0, scale: float = 1.0) -> bytes:
    """Numbers whose channels have offsets of their own, as K's have."""
    layout, dice = kv_layout(spec), np.random.default_rng(seed)
    num_blocks = spec.chunk_tokens // BLOCK
    tokens = dice.standard_normal((num_blocks, LAYERS, 2, BLOCK, HEADS, CHANNELS))
    tokens[:, :, 0] += 10 * dice.standard_normal((HEADS, CHANNELS))
    numbers = np.empty(tokens.size, np.float32)
    layout.canonical(numbers)[...] = scale * tokens
    if spec.dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    return numbers.astype({"float32": "<f4", "float16": "<f2"}[spec.dtype]).tobytes()


def chunk_with(payload: bytes, spec: KVSpec, number: int = 1, num_tokens: int | None = None) -> TierChunk:
    key = ChunkKey(number.to_bytes(16, "big"))
    tokens = spec.chunk_tokens if num_tokens is None else num_tokens
    header = ChunkHeader(key, spec.fingerprint, tokens, len(payload), checksum([memoryview(payload)]), 1)
    return TierChunk(ChunkName(spec.fingerprint, key), [memoryview(bytearray(pack(header) + payload))])


def numbers_of(payload: bytes, spec: KVSpec) -> np.ndarray:
    raw = np.frombuffer(payload, {"bfloat16": "<u2", "float32": "<f4", "float16": "<f2"}[spec.dtype])
    flat = (raw.astype(np.uint32) << 16).view(np.float32) if spec.dtype == "bfloat16" else raw.astype(np.float32)
    return kv_layout(spec).canonical(flat)


async def save_one(tier: CodecTier, chunk: TierChunk) -> TierOutcome:
    (outcome,) = await tier.save([chunk], timeout_s=CALL_S)
    return outcome


async def load_one(tier: CodecTier, room: TierChunk) -> TierOutcome:
    (outcome,) = await tier.load([room], timeout_s=CALL_S)
    return outcome


@pytest.fixture
async def under():
    return MemoryTier(1 << 26, ManualClock())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [16, 64, 80, 208])
def test_int8_decodes_to_what_its_encoder_said_and_near_the_truth(dtype, tokens):
    spec = spec_of(dtype, chunk_tokens=tokens)
    payload, layout = payload_of(spec), kv_layout(spec)
    body, decoded = int8.encode(memoryview(payload), layout, tokens)
    assert len(body) == int8.encoded_bytes(len(payload), layout) < len(payload)
    into = memoryview(bytearray(len(payload)))
    assert int8.decode(memoryview(body), layout, into) and bytes(into) == decoded
    exact, near = numbers_of(payload, spec), numbers_of(decoded, spec)
    steps = np.ptp(exact, axis=(0, 3))[None, :, :, None]  # per channel, over all tokens: not below K's own
    assert (np.abs(exact - near)[:, :, 0] <= 0.51 * steps[:, :, 0] / 255 + np.abs(exact[:, :, 0]) / 128).all()
    per_token = np.ptp(exact[:, :, 1], axis=-1, keepdims=True) / 255
    assert (np.abs(exact - near)[:, :, 1] <= 0.51 * per_token + np.abs(exact[:, :, 1]) / 128 + 1e-3).all()


def test_int8_knows_no_row_that_means_nothing_and_gives_up_what_does_not_fit():
    spec = spec_of("float32")
    layout, payload = kv_layout(spec), payload_of(spec)
    rubbish = numbers_of(payload, spec).copy()
    rubbish[-1, :, :, 4:] = np.nan
    flat = np.empty(rubbish.size, np.float32)
    layout.canonical(flat)[...] = rubbish
    body, decoded = int8.encode(memoryview(flat.tobytes()), layout, 68)
    near = numbers_of(decoded, spec)
    assert (near[-1, :, :, 4:] == near[-1, :, :, 3:4]).all() and body, "they widen no range"
    assert np.allclose(near[:-1], rubbish[:-1], atol=0.05)
    assert int8.encode(memoryview(flat.tobytes()), layout, 80) is None
    assert int8.encode(memoryview(payload_of(spec, scale=1e6)), layout, 80) is None


@pytest.mark.parametrize("seed", range(4))
def test_int8_takes_any_body_of_its_length_and_no_other(seed):
    spec, dice = spec_of("bfloat16"), random.Random(seed)
    layout, length = kv_layout(spec), spec.chunk_bytes
    into = memoryview(bytearray(length))
    assert int8.decode(memoryview(dice.randbytes(int8.encoded_bytes(length, layout))), layout, into)
    for wrong in (0, 1, length, int8.encoded_bytes(length, layout) - 1):
        assert not int8.decode(memoryview(dice.randbytes(wrong)), layout, into)
    assert not int8.decode(memoryview(b""), layout, memoryview(bytearray(3)))


@pytest.mark.parametrize("size", [1, 31, 4096, 100_001, 1 << 20])
@pytest.mark.parametrize("element_bytes", [1, 2, 4])
def test_lossless_gives_back_every_byte(size, element_bytes):
    payload = (payload_of(spec_of("bfloat16", chunk_tokens=16 * (1 + size // 1500))) * 2)[:size]
    body, into = lossless.encode(memoryview(payload), element_bytes), memoryview(bytearray(size))
    assert lossless.decode(memoryview(body), into) and bytes(into) == payload


def test_lossless_makes_real_numbers_smaller():
    payload = payload_of(spec_of("bfloat16", chunk_tokens=1600))
    assert len(lossless.encode(memoryview(payload), 2)) < 0.8 * len(payload)


@pytest.mark.parametrize("seed", range(8))
def test_hostile_bodies_write_nowhere_else_and_allocate_nothing(seed):
    dice, payload = random.Random(seed), payload_of(spec_of("bfloat16", chunk_tokens=160))
    body, guard = lossless.encode(memoryview(payload), 2), b"\xee" * 4096
    memory = bytearray(guard + bytes(len(payload)) + guard)
    into = memoryview(memory)[4096:-4096]
    for _ in range(300):
        hostile = bytearray(body)
        for _ in range(dice.choice([1, 3, 40])):
            hostile[dice.randrange(len(hostile) if dice.random() < 0.7 else 64)] = dice.randrange(256)
        if dice.random() < 0.3:
            del hostile[dice.randrange(len(hostile)) :]
        lossless.decode(memoryview(bytes(hostile)), into)
        assert memory.startswith(guard) and memory.endswith(guard)
    for claimed in (0xFFFFFFFF, 0x7FFFFFFF, len(payload) + 1, 0):
        hostile = bytearray(body)
        hostile[4:8] = claimed.to_bytes(4, "little")
        assert not lossless.decode(memoryview(bytes(hostile)), into)
    assert not lossless.decode(memoryview(body[:-1]), into) and not lossless.decode(memoryview(b""), into)


def test_a_frame_that_was_touched_is_none():
    raw = pack_frame(Frame(1, 2, 1 << 40))
    assert len(raw) == FRAME_BYTES and parse_frame(raw) == Frame(1, 2, 1 << 40)
    for bit in range(8 * FRAME_BYTES):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        assert parse_frame(flipped) is None
    assert parse_frame(raw[:-1]) is None


def test_a_frame_as_it_is_published():
    """The test vector of docs/wire-formats.md."""
    assert pack_frame(Frame(1, 2, 0x0102030405060708)).hex() == (
        "4b5646434f44454301004000010002000807060504030201" + "00" * 36 + "537f4cd7"
    )


def test_lengths_tell_what_is_whole():
    chunk = chunk_of(name_of(1), 1000)
    raw = content(chunk)
    assert is_whole(raw, len(raw)) and not is_whole(raw, len(raw) - 1) and not is_whole(b"", 0)
    encoded = raw[:HEADER_BYTES] + pack_frame(Frame(1, 2, 500)) + bytes(500)
    assert is_whole(encoded[:FRONT_BYTES], len(encoded)) and not is_whole(encoded[:FRONT_BYTES], len(encoded) - 1)
    longer = raw[:HEADER_BYTES] + pack_frame(Frame(1, 2, 1000))
    assert not is_whole(longer, len(longer) + 1000), "what is encoded is shorter"


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        (f"paged.L2BHD.b{BLOCK}", "L2BHD"),
        (f"vllm.v1.cuda.bfloat16.b{BLOCK}.{HEADS}x{BLOCK}x{2 * CHANNELS}.L{LAYERS}", "LHB2D"),
        (f"vllm.v1.cuda.bfloat16.b{BLOCK}.{HEADS}x{BLOCK}x{2 * CHANNELS}.o102.L{LAYERS}", "LBH2D"),
        (f"vllm.v1.cuda.bfloat16.b{BLOCK}.2x{BLOCK}x{HEADS}x{CHANNELS}.L{LAYERS}", "L2BHD"),
        (f"vllm.v1.cuda.bfloat16.b{BLOCK}.2x{BLOCK}x{HEADS}x{CHANNELS}.o0213.L{LAYERS}", "L2HBD"),
        (f"vllm.v1.cuda.bfloat16.b{BLOCK}.2x{HEADS}x{BLOCK}x{CHANNELS}.L{LAYERS}", "L2HBD"),
    ],
)
def test_a_layout_says_where_each_number_lies(layout, axes):
    found = kv_layout(spec_of("bfloat16", layout))
    assert found.axes == axes
    extents = {"L": LAYERS, "2": 2, "B": BLOCK, "H": HEADS, "D": CHANNELS}
    strides, stride = {}, 1
    for axis in reversed(axes):
        strides[axis], stride = stride, stride * extents[axis]
    numbers = found.canonical(np.arange(2 * stride))
    assert numbers.shape == (2, LAYERS, 2, BLOCK, HEADS, CHANNELS)
    at = {"L": 1, "2": 1, "B": 5, "H": 2, "D": 7}
    assert numbers[1, 1, 1, 5, 2, 7] == stride + sum(strides[axis] * at[axis] for axis in axes)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (spec_of("uint8"), "its numbers are uint8"),
        (spec_of(layout="sim.b16"), "where K and V lie in sim.b16 is not known"),
        (spec_of(layout=f"vllm.v1.cpu.x86_64.bfloat16.b{BLOCK}.{HEADS}x{BLOCK}x{2 * CHANNELS}.L2"), "kernels for CPUs"),
        (spec_of(layout=f"vllm.v1.cuda.bfloat16.b{BLOCK}.1x{BLOCK}x576.L2"), "which axis of .* is not known"),
        (spec_of(layout=f"vllm.v1.cuda.bfloat16.b{BLOCK}.{HEADS}x{BLOCK}x16.o012345.L2"), "cannot be read"),
        (msgspec.structs.replace(spec_of(), chunk_bytes=1234), "is not made of blocks"),
        (spec_of(chunk_tokens=24), "is not made of blocks"),
    ],
)
async def test_int8_is_refused_by_name_where_the_layout_is_not_known(spec, why, under):
    with pytest.raises(UnknownLayoutError, match=why):
        kv_layout(spec)
    with pytest.raises(ConfigError, match=f"tiers.memory.codec: int8 cannot be used here: .*{why}"):
        CodecTier(under, "int8").use(spec)
    CodecTier(under, "lossless").use(spec)


async def test_int8_is_refused_with_tensor_parallelism(under):
    with pytest.raises(ConfigError, match="tensor parallelism"):
        CodecTier(under, "int8").use(msgspec.structs.replace(spec_of(), tp_size=2))


async def test_without_blosc2_the_way_to_install_it_is_said(under, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kvstore.codecs.lossless", None)
    with pytest.raises(ConfigError, match=r"tiers.memory.codec: lossless needs blosc2: pip install 'kvferry\[codec\]'"):
        CodecTier(under, "lossless")
    CodecTier(under)


async def test_one_tier_holds_both_kinds_and_every_setting_reads_them(under):
    spec = spec_of()
    encoding, plain = CodecTier(under, "lossless"), CodecTier(under)
    encoding.use(spec)
    small, raw = chunk_with(payload_of(spec, 1), spec, 1), chunk_with(payload_of(spec, 2), spec, 2)
    noise = chunk_with(random.Random(3).randbytes(spec.chunk_bytes), spec, 3)
    assert [await save_one(encoding, small), await save_one(plain, raw), await save_one(encoding, noise)] == [OK] * 3
    sizes = [len(under.chunks[chunk.name][0]) for chunk in (small, raw, noise)]
    assert sizes[0] < small.num_bytes and sizes[1:] == [raw.num_bytes, noise.num_bytes]
    for tier in (encoding, plain):
        for chunk in (small, raw, noise):
            room = room_for(chunk)
            assert await load_one(tier, room) == OK and content(room) == content(chunk)
            assert await load_one(tier, room_for(chunk, more_bytes=1)) == TOO_LARGE


async def test_what_int8_gives_back_is_whole_by_its_own_checksum(under):
    spec = spec_of("float32")
    tier = CodecTier(under, "int8")
    tier.use(spec)
    chunk = chunk_with(payload_of(spec), spec)
    assert await save_one(tier, chunk) == OK and len(under.chunks[chunk.name][0]) < chunk.num_bytes / 3
    room = room_for(chunk)
    assert await load_one(tier, room) == OK and content(room) != content(chunk)
    header, payload = parse(content(room)), content(room)[HEADER_BYTES:]
    assert header.checksum == checksum([memoryview(payload)])
    assert replace(header, checksum=0) == replace(parse(content(chunk)), checksum=0)
    assert np.allclose(numbers_of(payload, spec), numbers_of(content(chunk)[HEADER_BYTES:], spec), atol=0.2)
    other = CodecTier(under, "int8")
    assert await load_one(other, room_for(chunk)) == MISSING, "its engine's KV is not known yet"


async def test_int8_launders_no_damage(under):
    spec = spec_of()
    tier = CodecTier(under, "int8")
    tier.use(spec)
    chunk = chunk_with(payload_of(spec), spec)
    chunk.memory[0][HEADER_BYTES + 3] ^= 1
    assert await save_one(tier, chunk) == OK
    room = room_for(chunk)
    assert await load_one(tier, room) == OK and content(room) == content(chunk), "as it was, for its reader to refuse"


async def test_kv_that_the_codec_does_not_know_is_saved_as_it_is(under):
    spec = spec_of()
    tier = CodecTier(under, "int8")
    tier.use(spec)
    others = msgspec.structs.replace(spec, weights_digest="others")
    chunk = chunk_with(payload_of(spec), others)
    assert await save_one(tier, chunk) == OK and under.chunks[chunk.name][0] == content(chunk)


async def test_a_torn_or_hostile_chunk_is_damaged_and_takes_no_memory(under):
    spec = spec_of()
    tier = CodecTier(under, "lossless")
    chunk = chunk_with(payload_of(spec), spec)
    await save_one(tier, chunk)
    good = under.chunks[chunk.name][0]
    huge = pack_frame(Frame(1, 2, 1 << 62))
    for bad in (
        good[:-1],
        good[: HEADER_BYTES + 10],
        good[:100],
        b"x",
        good[:HEADER_BYTES] + huge + good[FRONT_BYTES:],
        bytes(len(good)),
        good[:FRONT_BYTES] + bytes(len(good) - FRONT_BYTES),
    ):
        under.chunks[chunk.name] = (bad, None)
        assert await load_one(tier, room_for(chunk)) == DAMAGED
    frame = pack_frame(Frame(77, 2, len(good) - FRONT_BYTES))
    under.chunks[chunk.name] = (good[:HEADER_BYTES] + frame + good[FRONT_BYTES:], None)
    assert await load_one(tier, room_for(chunk)) == MISSING, "of a codec to come"


async def test_a_cancelled_call_lets_go_of_its_memory(under):
    spec = spec_of("float32", chunk_tokens=16_000)
    tier = CodecTier(under, "int8")
    tier.use(spec)
    chunk = chunk_with(payload_of(spec), spec)
    saving = asyncio.create_task(save_one(tier, chunk))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    saving.cancel()
    await asyncio.gather(saving, return_exceptions=True)
    assert await save_one(tier, chunk) == OK
    room = room_for(chunk)
    loading = asyncio.create_task(load_one(tier, room))
    for _ in range(6):
        await asyncio.sleep(0)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    before = content(room)
    assert await load_one(tier, room_for(chunk)) == OK and content(room) == before
    assert await tier.load([room_for(chunk)], timeout_s=0.0) == [TierOutcome.UNAVAILABLE]
    await tier.aclose()


def test_every_dtype_has_its_size():
    for dtype, item_bytes in ITEM_BYTES.items():
        assert kv_layout(spec_of(dtype)).block_bytes == LAYERS * 2 * BLOCK * HEADS * CHANNELS * item_bytes
    assert KVLayout("L2BHD", (1, 2, 3, 4, 5), "float32").block_tokens == 3
