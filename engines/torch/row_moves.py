"""Copies rows of KV between blocks and turns K from the positions that it was computed at to others.

RoPE turns each pair of K's numbers by an angle that grows with the position, so K at another position is K turned by
the difference, in float32. What scales K beside that (yarn's attention factor) is in K already and stays.
"""

from collections.abc import Sequence
from typing import Any

import torch

from engines.paged.runner import RowMove
from engines.torch.kv_cache import PagedKV

_AT_ONCE = 256
_TURNABLE_ROPE = ("default", "linear", "llama3", "yarn")


def documents_problem(config: Any, frequencies: torch.Tensor, head_dim: int) -> str:
    """Why K of this model cannot be turned, or empty. `config`: transformers' of the model; `frequencies`: radians a
    position, one a pair of numbers."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _TURNABLE_ROPE:
        return f"its RoPE is of type {kind!r}, whose frequencies change with the length of a sequence"
    layers = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in layers or getattr(config, "sliding_window", None) is not None:
        return "it has layers with a sliding window, which would not see a document's beginning as it was computed"
    if getattr(config, "kv_lora_rank", None):
        return "its KV is compressed (MLA): positions are not in K alone"
    if len(frequencies) * 2 != head_dim:
        return f"RoPE turns {len(frequencies) * 2} of the {head_dim} numbers of a head"
    return ""


class RowMover:
    """Moves rows of one KV memory, whose K is turned by `frequencies`, [head_dim / 2] radians a position."""

    def __init__(self, kv: PagedKV, frequencies: torch.Tensor) -> None:
        self._kv = kv
        self._frequencies = frequencies.float()

    def run(self, moves: Sequence[RowMove], fresh: Sequence[int]) -> None:
        """See `ModelRunner.move`."""
        for block in fresh:
            self._kv.clear_block(block)
        for move in moves:
            for first in range(0, move.count, _AT_ONCE):
                self._move(move, first, min(_AT_ONCE, move.count - first))

    def _move(self, move: RowMove, first: int, count: int) -> None:
        kept = self._rows(move.source, move.source_row + first, count)
        wanted = self._rows(move.target, move.target_row + first, count)
        rows = self._kv.blocks[kept[0], :, :, kept[1]]  # [count, layers, 2, kv_heads, head_dim]
        if move.position != move.computed_at:
            keys = rows[:, :, 0]
            keys.copy_(self._turned(keys.float(), move.position - move.computed_at))
        self._kv.blocks[wanted[0], :, :, wanted[1]] = rows

    def _rows(self, table: Sequence[int], first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self._kv.geometry.block_size
        rows = torch.arange(first, first + count)
        return torch.tensor(table)[rows // size], rows % size

    def _turned(self, keys: torch.Tensor, distance: int) -> torch.Tensor:
        angles = self._frequencies * distance
        cos, sin = angles.cos(), angles.sin()
        low, high = keys.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
