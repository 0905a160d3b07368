"""Lossy, 8 bits a number: K per channel over 64 tokens, V per token and head, each with a least value and a step. Pure.

K's channels have offsets that swamp steps per token (KIVI). Measured on SmolLM2: 0.53 of the size of bfloat16, a KL of
0.00003 to the exact KV, where fp8 has 0.0023. What is decoded depends on the body alone, to the bit, on any machine.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.layout import ITEM_BYTES, Array, KVLayout

_GROUP_TOKENS = 64
_LARGEST = 60_000.0
"""Least values and steps are float16, which ends at 65,504."""
_NUMPY: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
_F16 = np.dtype("<f2")
Floats = npt.NDArray[np.float32]


def encode(payload: memoryview, layout: KVLayout, num_tokens: int) -> tuple[bytes, bytes] | None:
    """The body, and the payload that it decodes to. None: its numbers do not fit. Rows behind `num_tokens`, which mean
    nothing, become copies of the last one, which widen no range."""
    tokens = _tokens(_floats(np.frombuffer(payload, _NUMPY[layout.dtype]), layout.dtype), layout)
    if 0 < num_tokens < tokens.shape[2]:
        tokens[:, :, num_tokens:] = tokens[:, :, num_tokens - 1 : num_tokens]
    if not (-_LARGEST <= tokens.min() <= tokens.max() <= _LARGEST):  # nor where one is no number
        return None
    parts = []
    for group, axis in _groups(tokens):
        least, step = _range(group, axis)
        np.subtract(group, least, out=group)
        np.divide(group, np.where(step == 0, 1, step), out=group)
        np.rint(group, out=group)
        codes = np.minimum(group, 255, out=group).astype(np.uint8)
        parts += [least.astype(_F16).tobytes(), step.astype(_F16).tobytes(), codes.tobytes()]
        _decode(codes, least, step, group)
    return b"".join(parts), _flat(tokens, layout).tobytes()


def decode(body: memoryview, layout: KVLayout, into: memoryview) -> bool:
    """Fill `into`, whatever is in `body`. False: it is not as long as it has to be."""
    if not into.nbytes or into.nbytes % layout.block_bytes or body.nbytes != encoded_bytes(into.nbytes, layout):
        return False
    tokens = _tokens(np.zeros(into.nbytes // ITEM_BYTES[layout.dtype], np.float32), layout)
    at = 0
    with np.errstate(all="ignore"):
        for group, axis in _groups(tokens):
            shape = list(group.shape)
            shape[axis] = 1
            size = math.prod(shape)
            least, step = np.frombuffer(body, _F16, 2 * size, at).astype(np.float32).reshape(2, *shape)
            codes = np.frombuffer(body, np.uint8, group.size, at + 4 * size).reshape(group.shape)
            _decode(codes, least, step, group)
            at += 4 * size + group.size
        np.frombuffer(into, _NUMPY[layout.dtype])[:] = _flat(tokens, layout)
    return True


def encoded_bytes(payload_bytes: int, layout: KVLayout) -> int:
    """The length of the body of a payload."""
    extent = dict(zip(layout.axes, layout.extents, strict=True))
    num_tokens = payload_bytes // layout.block_bytes * extent["B"]
    num_groups = -(-num_tokens // _GROUP_TOKENS)
    values = 2 * extent["L"] * num_tokens * extent["H"] * extent["D"]
    return values + 4 * extent["L"] * extent["H"] * (num_groups * extent["D"] + num_tokens)


def _tokens(numbers: Floats, layout: KVLayout) -> Floats:
    """As `[layers, 2, tokens, heads, channels]`, a copy."""
    blocks = layout.canonical(numbers)
    num_blocks, layers, two, tokens, heads, channels = blocks.shape
    joined = blocks.transpose(1, 2, 0, 3, 4, 5).reshape(layers, two, num_blocks * tokens, heads, channels)
    return joined.astype(np.float32, copy=True)


def _flat(tokens: Floats, layout: KVLayout) -> Array:
    """The numbers of a payload, from `[layers, 2, tokens, heads, channels]`."""
    layers, two, _, heads, channels = tokens.shape
    blocks = tokens.reshape(layers, two, -1, layout.block_tokens, heads, channels).transpose(2, 0, 1, 3, 4, 5)
    numbers = np.empty(tokens.size, np.float32)
    layout.canonical(numbers)[...] = blocks
    if layout.dtype == "bfloat16":  # the nearer one, the even one of two as near
        bits = numbers.view(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(_NUMPY["bfloat16"])
    return numbers.astype(_NUMPY[layout.dtype])


def _floats(raw: Array, dtype: str) -> Floats:
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def _groups(tokens: Floats) -> Iterator[tuple[Floats, int]]:
    """Views `[tokens, heads, channels]` of each layer, small enough for a processor's cache, and the axis that shares a
    step: 64 tokens of K, then of V, and so on."""
    for layer in tokens:
        for start in range(0, tokens.shape[2], _GROUP_TOKENS):
            for axis, both in ((0, layer[0]), (2, layer[1])):
                yield both[start : start + _GROUP_TOKENS], axis


def _range(group: Floats, axis: int) -> tuple[Floats, Floats]:
    """Least value and step, as they are when read from float16: what lies between fits into 255 steps."""
    low, high = group.min(axis, keepdims=True), group.max(axis, keepdims=True)
    least = low.astype(_F16)
    least = np.where(least.astype(np.float32) > low, np.nextafter(least, _F16.type(-np.inf)), least).astype(np.float32)
    exact = (high - least) / np.float32(255)
    step = exact.astype(_F16)
    step = np.where(step.astype(np.float32) < exact, np.nextafter(step, _F16.type(np.inf)), step).astype(np.float32)
    return least, step


def _decode(codes: npt.NDArray[np.uint8], least: Floats, step: Floats, into: Floats) -> None:
    np.multiply(codes, step, out=into)
    into += least
