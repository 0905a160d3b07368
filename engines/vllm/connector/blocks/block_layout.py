"""Where the bytes of a block lie in vLLM's KV tensors, and a name for their order. Measured once, from the tensors.

vLLM shows each layer as [num_blocks, kv_heads, block_size, K and V], with the strides of its cache layout (older ones:
K and V apart, [2, num_blocks, ...]). Invariant: a payload is a block's bytes, layer by layer, within a layer in the
order of memory; no two blocks share a byte.
"""

import itertools
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engines.vllm.connector.settings import Provenance
from kvcore.errors import ConfigError
from kvcore.types import KVSpec

_MAX_RANGES = 128
"""Of one layer's block. vLLM's LHBNC has two a KV head. A layout with more than this has scattered rows, not blocks."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes of every block: those of block b begin at `offset + b * stride` of storage number `storage`."""

    storage: int
    offset: int
    stride: int
    length: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One engine's. `storages`: flat uint8 tensors over the memory that holds the layers' tensors."""

    storages: tuple[torch.Tensor, ...]
    ranges: tuple[ByteRange, ...]
    """The ranges of a block, in the payload's order."""
    num_blocks: int
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    layout_id: str

    @property
    def block_bytes(self) -> int:
        """Size of one block's payload."""
        return sum(part.length for part in self.ranges)

    @property
    def device(self) -> torch.device:
        """The device that holds the tensors."""
        return self.storages[0].device

    def check(self, block_id: int) -> None:
        """Raises IndexError for an unknown block."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")

    def spans(self, block_id: int) -> list[tuple[int, int, int]]:
        """(storage, start, end) of a block's ranges. Raises IndexError for an unknown block."""
        self.check(block_id)
        starts = [(part, part.offset + block_id * part.stride) for part in self.ranges]
        return [(part.storage, start, start + part.length) for part, start in starts]

    def build_spec(self, provenance: Provenance, chunk_tokens: int, rank: int, size: int) -> KVSpec:
        """This rank's KVSpec. Raises ConfigError unless a chunk is a whole number of blocks."""
        if chunk_tokens % self.block_size:
            raise ConfigError(
                f"kv.chunk_tokens: {chunk_tokens} is not a multiple of vLLM's block size, {self.block_size}. "
                "Correct it, or set engine.args.block-size"
            )
        return KVSpec(
            model_id=provenance.model_id,
            weights_digest=provenance.weights_digest,
            tokenizer_digest=provenance.tokenizer_digest,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            attention=provenance.attention,
            layout_id=self.layout_id,
            chunk_tokens=chunk_tokens,
            chunk_bytes=chunk_tokens // self.block_size * self.block_bytes,
            tp_rank=rank,
            tp_size=size,
            declared=provenance.declared,
        )


def measure(kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int, block_size: int) -> BlockLayout:
    """The layout of the tensors that vLLM passes to register_kv_caches. Layers are ordered by the index in their names.

    A layer that shares the tensor of another one (cross-layer sharing) adds nothing. Raises ConfigError that names the
    layer if a block's bytes are not ranges that belong to this block alone.
    """
    layers: list[_Layer] = []
    for name in sorted(kv_caches, key=_layer_order):
        layer = _Layer.of(name, kv_caches[name], num_blocks)
        if not any(layer.is_same_memory(other) for other in layers):
            layers.append(layer)
    if not layers:
        raise ConfigError("vLLM has handed over no KV tensors: a model without attention KV has nothing to store")
    first = layers[0]
    for layer in layers[1:]:
        if layer.kind != first.kind:
            raise _unsupported(layer.name, layer.tensor, f"unlike {first.name}'s: all layers' KV must be of one shape")
    storages: dict[int, torch.Tensor] = {}
    ranges: list[ByteRange] = []
    for layer in layers:
        storage = layer.tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            flat = torch.empty(0, dtype=torch.uint8, device=layer.tensor.device)
            storages[storage.data_ptr()] = flat.set_(storage)
        ranges += layer.ranges(list(storages).index(storage.data_ptr()))
    _check_disjoint(ranges, num_blocks)
    return BlockLayout(
        storages=tuple(storages.values()),
        ranges=tuple(_merged(ranges)),
        num_blocks=num_blocks,
        block_size=block_size,
        num_layers=len(layers),
        num_kv_heads=first.num_kv_heads(block_size),
        head_dim=first.head_dim,
        dtype=first.dtype,
        layout_id=f"vllm.v1.{_packing(first.tensor)}.{first.dtype}.b{block_size}.{first.shape_text}.L{len(layers)}",
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's tensor.

    `shape`: without the dimension that counts blocks. `axes`: (extent, stride in bytes) of those dimensions, the
    outermost in memory first, without extents of 1. `order`: the position of each axis in `shape`.
    """

    name: str
    tensor: torch.Tensor
    block_stride: int
    shape: tuple[int, ...]
    axes: tuple[tuple[int, int], ...]
    order: tuple[int, ...]
    head_dim: int

    @classmethod
    def of(cls, name: str, found: object, num_blocks: int) -> "_Layer":
        if not isinstance(found, torch.Tensor):
            raise ConfigError(f"layer {name}: its KV is a {type(found).__name__}, not a tensor of blocks; {_ADVICE}")
        tensor = found
        fused = tensor.dim() == 4  # K and V in one row
        if fused and tensor.shape[0] != num_blocks and tensor.shape[0] % num_blocks == 0:
            tensor = tensor.unflatten(0, (num_blocks, -1))  # kernels may split a block into several: group them
        block_dims = [dim for dim in range(1 if fused else 2) if tensor.shape[dim : dim + 1] == (num_blocks,)]
        if len(block_dims) != 1 or found.dim() not in (4, 5):
            why = f"without one dimension of {num_blocks} blocks in the place where vLLM has it"
            raise _unsupported(name, found, why)
        itemsize = int(tensor.element_size())
        strides = [int(stride) * itemsize for stride in tensor.stride()]
        rest = [dim for dim in range(tensor.dim()) if dim != block_dims[0]]
        order = sorted((n for n, dim in enumerate(rest) if tensor.shape[dim] > 1), key=lambda n: -strides[rest[n]])
        return cls(
            name=name,
            tensor=tensor,
            block_stride=strides[block_dims[0]],
            shape=tuple(int(tensor.shape[dim]) for dim in rest),
            axes=tuple((int(tensor.shape[rest[n]]), strides[rest[n]]) for n in order),
            order=tuple(order),
            head_dim=int(tensor.shape[-1]) // (2 if fused else 1),
        )

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal in all layers."""
        return self.dtype, self.shape, self.axes, self.block_stride, self.tensor.device

    @property
    def shape_text(self) -> str:
        """The block's shape, followed by the order of its dimensions in memory if that is another one."""
        in_order = self.order == tuple(sorted(self.order))
        return "x".join(map(str, self.shape)) + ("" if in_order else ".o" + "".join(map(str, self.order)))

    def is_same_memory(self, other: "_Layer") -> bool:
        return self.tensor.data_ptr() == other.tensor.data_ptr() and self.kind == other.kind

    def num_kv_heads(self, block_size: int) -> int:
        """Computed from the block's size, as K and V have the same."""
        return math.prod(self.shape) // (2 * block_size * max(1, self.head_dim))

    def ranges(self, storage: int) -> list[ByteRange]:
        """The layer's ranges, in the order of memory. Raises ConfigError for scattered or overlapping rows."""
        length, outer = int(self.tensor.element_size()), list(self.axes)
        while outer and outer[-1][1] == length:
            length *= outer.pop()[0]
        count = math.prod(extent for extent, _ in outer)
        row = self.shape[-1] * int(self.tensor.element_size())
        if count > _MAX_RANGES or length < row or any(stride < length for _, stride in outer):
            raise _unsupported(self.name, self.tensor, f"whose blocks are {count} pieces of {length} bytes")
        start = int(self.tensor.storage_offset() * self.tensor.element_size())
        offsets = itertools.product(*(range(0, extent * stride, stride) for extent, stride in outer))
        return [ByteRange(storage, start + sum(parts), self.block_stride, length) for parts in offsets]


_ADVICE = (
    "kvferry stores attention KV that lies in blocks of bytes: serve this model without kvferry, or with another cache "
    "layout of vLLM's (VLLM_KV_CACHE_LAYOUT=LBHNC)"
)


def _unsupported(name: str, tensor: torch.Tensor, why: str) -> ConfigError:
    return ConfigError(
        f"layer {name}: a KV tensor of shape {list(tensor.shape)}, strides {list(tensor.stride())}, {why}; {_ADVICE}"
    )


def _layer_order(name: str) -> tuple[int, str]:
    """Sorts by the first number among the name's parts, as in `model.layers.7.self_attn.attn`."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else -1, name


def _merged(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    """Join ranges that are neighbours in memory."""
    merged: list[ByteRange] = []
    for part in ranges:
        last = merged[-1] if merged else None
        if last is not None and (last.storage, last.stride, last.offset + last.length) == (
            part.storage,
            part.stride,
            part.offset,
        ):
            merged[-1] = ByteRange(last.storage, last.offset, last.stride, last.length + part.length)
        else:
            merged.append(part)
    return merged


def _check_disjoint(ranges: Sequence[ByteRange], num_blocks: int) -> None:
    """Raise ConfigError if a byte belongs to two ranges or two blocks. All ranges have the same stride."""
    stride = ranges[0].stride
    storage = np.array([part.storage for part in ranges])
    start = np.array([part.offset for part in ranges], dtype=np.int64)
    length = np.array([part.length for part in ranges], dtype=np.int64)
    end = start + (num_blocks - 1) * stride + length
    if num_blocks > 1 and stride < length.max():
        raise ConfigError(f"vLLM's KV blocks overlap: {length.max()} bytes or more, every {stride} bytes; {_ADVICE}")
    for n in range(len(ranges) - 1):
        others = slice(n + 1, None)
        extents_meet = (storage[others] == storage[n]) & (start[others] < end[n]) & (start[n] < end[others])
        gap = (start[others] - start[n]) % max(1, stride)
        interleaved = (gap >= length[n]) & (gap + length[others] <= stride)
        if np.any(extents_meet & ~interleaved):
            raise ConfigError(f"vLLM's KV layers share memory, as those of several kinds of attention do; {_ADVICE}")


def _packing(tensor: torch.Tensor) -> str:
    """The kernels that arrange K and V within a block. How vLLM's CPU kernels do it depends on the processor."""
    if tensor.device.type != "cpu":
        return str(tensor.device.type)
    amx = tensor.dtype.itemsize < 4 and torch.cpu._is_amx_tile_supported()
    return f"cpu.{platform.machine()}{'-amx' if amx else ''}"
