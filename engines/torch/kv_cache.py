"""The engine's KV memory: one tensor of blocks in the layout that also goes into the store.

Layout `paged.L2BHD.b<block size>`: [num_blocks, layers, 2, block, kv_heads, head_dim], contiguous, index 0 of the third
axis is K (after RoPE), 1 is V. One block is therefore one contiguous range of bytes and a chunk a few of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """The shape of one block."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """K and V of one token over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * int(self.dtype.itemsize)

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        return self.block_size * self.token_bytes

    @property
    def layout_id(self) -> str:
        """The name of the byte order, as `KVSpec.layout_id` has it."""
        return f"paged.L2BHD.b{self.block_size}"


class PagedKV:
    """All blocks, and per layer the views through which attention writes rows and gathers pages.

    `rows[l]` is (K, V), each [.., kv_heads * head_dim]: token row r of block b is index `b * row_stride + r`.
    `pages[l]` is (K, V), each [.., block * kv_heads * head_dim]: block b is index `b * page_stride`.
    """

    def __init__(self, geometry: KVGeometry, num_blocks: int) -> None:
        g = self.geometry = geometry
        self.num_blocks = num_blocks
        shape = (num_blocks, g.num_layers, 2, g.block_size, g.num_kv_heads, g.head_dim)
        # Written once here: fresh pages would otherwise fault in the middle of the first transfers.
        self.blocks = torch.empty(shape, dtype=g.dtype).zero_()
        self.row_stride = g.num_layers * 2 * g.block_size
        self.page_stride = g.num_layers * 2
        row_width = g.num_kv_heads * g.head_dim
        rows, pages = self.blocks.view(-1, row_width), self.blocks.view(-1, g.block_size * row_width)
        self.rows = [
            (rows[2 * layer * g.block_size :], rows[(2 * layer + 1) * g.block_size :]) for layer in range(g.num_layers)
        ]
        self.pages = [(pages[2 * layer :], pages[2 * layer + 1 :]) for layer in range(g.num_layers)]
        # numpy knows no bfloat16, so the bytes are shown as bytes.
        self.memory = memoryview(self.blocks.view(-1).view(torch.uint8).numpy())
        """The bytes of all blocks."""

    def block_view(self, block_id: int) -> memoryview:
        """The bytes of one block, writable; the same address each time. Raises IndexError for an unknown block."""
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")
        size = self.geometry.block_bytes
        return self.memory[block_id * size : (block_id + 1) * size]

    def distance(self, blocks: Sequence[int], others: Sequence[int]) -> float:
        """See `ModelRunner.distance`."""
        one, other = (self.blocks[list(ids)].float() for ids in (blocks, others))
        apart, most = ((one - other).abs().amax((0, 1, 3, 4, 5)), one.abs().amax((0, 1, 3, 4, 5)))
        worst = float((apart / most.clamp(min=torch.finfo(torch.float32).tiny)).amax())
        return worst if math.isfinite(worst) else math.inf

    def clear_block(self, block_id: int) -> None:
        """Zero all its rows."""
        self.blocks[block_id].zero_()

    def copy_block(self, source: int, target: int) -> None:
        """Overwrite `target` with `source`."""
        self.block_view(target)[:] = self.block_view(source)
