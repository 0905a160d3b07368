"""Many blocks of one engine as one flat piece of memory on the same device, gathered and scattered in a few operations.

A block lies in as many places as there are layers, or heads times layers: one copy each would cost more time than the
bytes take. Most layouts need one operation for all of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engines.vllm.connector.blocks.block_layout import BlockLayout, ByteRange

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True)
class _Part:
    """Ranges of every block that lie apart by one distance. `blocks`: [num_blocks, ranges, words], a view of the
    engine's memory; in a packed block they follow each other from word `start` on."""

    blocks: torch.Tensor
    start: int


class PackedBlocks:
    """One engine's. `packed` is flat uint8 memory of the tensors' device: the blocks' payloads, one after the other."""

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        numbers = (number for part in layout.ranges for number in (part.offset, part.stride, part.length))
        word_bytes = math.gcd(max(_WORDS), *numbers)
        self._word = _WORDS[word_bytes]
        self._words = layout.block_bytes // word_bytes
        self._parts = tuple(_parts(layout, self._word))

    def gather(self, block_ids: Sequence[int], packed: torch.Tensor) -> None:
        """Copy these blocks into `packed`, which has their size. Raises IndexError for an unknown block."""
        index, rows = self._index(block_ids), self._rows(packed)
        for part in self._parts:
            torch.index_select(part.blocks, 0, index, out=_columns(rows, part))

    def scatter(self, packed: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Copy `packed` into these blocks, each named once. Raises IndexError for an unknown block."""
        index, rows = self._index(block_ids), self._rows(packed)
        for part in self._parts:
            part.blocks.index_copy_(0, index, _columns(rows, part))

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        """Checked here: a GPU that meets an index out of range is of no use to its process any more."""
        for block_id in block_ids:
            self._layout.check(block_id)
        return torch.tensor(block_ids, dtype=torch.int64).to(self._layout.device, non_blocking=True)

    def _rows(self, packed: torch.Tensor) -> torch.Tensor:
        return packed.view(self._word).view(packed.numel() // self._layout.block_bytes, self._words)


def _columns(rows: torch.Tensor, part: _Part) -> torch.Tensor:
    """The part's place in each of the rows."""
    _, num_ranges, length = part.blocks.shape
    return rows[:, part.start : part.start + num_ranges * length].unflatten(1, (num_ranges, length))


def _parts(layout: BlockLayout, word: torch.dtype) -> Iterator[_Part]:
    size, start, ranges = word.itemsize, 0, list(layout.ranges)
    while ranges:
        first, count = ranges[0], _count_alike(ranges)
        distance = ranges[1].offset - first.offset if count > 1 else first.length
        storage = layout.storages[first.storage]
        blocks = torch.as_strided(
            storage[: storage.numel() // size * size].view(word),
            (layout.num_blocks, count, first.length // size),
            (first.stride // size, distance // size, 1),
            first.offset // size,
        )
        yield _Part(blocks, start)
        start += count * first.length // size
        ranges = ranges[count:]


def _count_alike(ranges: Sequence[ByteRange]) -> int:
    """How many of the first ranges are alike and equally far apart, forwards."""
    count, first = 1, ranges[0]
    distance = ranges[1].offset - first.offset if len(ranges) > 1 else 0
    while count < len(ranges) and distance > 0:
        wanted = ByteRange(first.storage, first.offset + count * distance, first.stride, first.length)
        if ranges[count] != wanted:
            break
        count += 1
    return count
