"""The index tensors of one step, built once and shared by all layers: which rows to write, which pages to read.

Owns no KV and runs no model. Slices with one new token are decodes and are attended together, padded, in groups of
like length; longer ones are prefill slices, attended one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engines.paged.runner import StepSlice
from engines.torch.kv_cache import PagedKV


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """Rows `[row, row + count)` of the batch, queries of one sequence.

    `pages`: page indices of the keys to read, None if they are exactly the slice's own fresh keys (then plain causal).
    `mask`: additive, [1, 1, count, num_keys].
    """

    row: int
    count: int
    num_keys: int
    pages: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single queries padded to the same number of keys.

    `rows`: [n] rows in the batch. `pages`: [n * pages_each], page indices. `mask`: additive, [n, 1, 1, num_keys], or
    None if every query sees every key.
    """

    rows: torch.Tensor
    pages: torch.Tensor
    num_keys: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Who attends to what in layers of one sliding window (or none)."""

    prefills: list[PrefillPart]
    decodes: list[DecodeGroup]


@dataclass(frozen=True, slots=True)
class _Decode:
    """One decode, its keys cut to the pages that the window touches: keys `[low, high)` of them are visible."""

    row: int
    table: np.ndarray[tuple[int], np.dtype[np.int64]]
    low: int
    high: int


class StepBatch:
    """One step's slices, flattened into one ragged batch.

    `token_ids` and `positions` are [1, num_tokens], `slots` [num_tokens] (row indices for `kv.rows`), `last_rows`
    [number of slices that sample] (their last rows in the batch, in order).
    """

    def __init__(self, slices: Sequence[StepSlice], kv: PagedKV) -> None:
        self.kv = kv
        self._slices = slices
        self._tables = [np.asarray(part.block_table, dtype=np.int64) for part in slices]
        counts = np.array([len(part.token_ids) for part in slices])
        ends = np.cumsum(counts)
        self._first_rows: list[int] = (ends - counts).tolist()
        block = kv.geometry.block_size
        positions = [np.arange(part.start, part.start + n) for part, n in zip(slices, counts, strict=True)]
        slots = [
            table[where // block] * kv.row_stride + where % block
            for table, where in zip(self._tables, positions, strict=True)
        ]
        tokens = [np.asarray(part.token_ids, dtype=np.int64) for part in slices]
        self.token_ids = torch.from_numpy(np.concatenate(tokens))[None]
        self.positions = torch.from_numpy(np.concatenate(positions))[None]
        self.slots = torch.from_numpy(np.concatenate(slots))
        self.last_rows = torch.tensor(
            [end - 1 for part, end in zip(slices, ends, strict=True) if part.sample is not None], dtype=torch.int64
        )
        self._plans: dict[int | None, AttentionPlan] = {}

    def plan(self, window: int | None) -> AttentionPlan:
        """The plan for layers that see the last `window` keys (None: all). Built at the first layer that asks."""
        if window not in self._plans:
            self._plans[window] = AttentionPlan(self._plan_prefills(window), self._plan_decodes(window))
        return self._plans[window]

    def _plan_prefills(self, window: int | None) -> list[PrefillPart]:
        block, parts = self.kv.geometry.block_size, []
        for part, table, row in zip(self._slices, self._tables, self._first_rows, strict=True):
            count = len(part.token_ids)
            if count == 1:
                continue
            if part.start == 0 and (window is None or count <= window):
                parts.append(PrefillPart(row, count, count, None, None))
                continue
            end = part.start + count
            first_page = 0 if window is None else max(0, part.start - window + 1) // block
            pages = torch.from_numpy(table[first_page : -(-end // block)] * self.kv.page_stride)
            base = first_page * block
            mask = self._causal_mask(part.start - base, count, end - base, window)
            parts.append(PrefillPart(row, count, end - base, pages, mask))
        return parts

    def _causal_mask(self, first_query: int, count: int, num_keys: int, window: int | None) -> torch.Tensor:
        """[1, 1, count, num_keys]: query `first_query + i` sees keys up to itself, `window` of them at most."""
        query = torch.arange(first_query, first_query + count)[:, None]
        key = torch.arange(num_keys)[None]
        visible = key <= query
        if window is not None:
            visible &= key > query - window
        return self._additive(visible)[None, None]

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(visible.shape, dtype=self.kv.geometry.dtype)
        return mask.masked_fill_(~visible, float("-inf"))

    def _plan_decodes(self, window: int | None) -> list[DecodeGroup]:
        block = self.kv.geometry.block_size
        buckets: dict[int, list[_Decode]] = {}
        for part, table, row in zip(self._slices, self._tables, self._first_rows, strict=True):
            if len(part.token_ids) != 1:
                continue
            end = part.start + 1
            oldest = 0 if window is None else max(0, end - window)
            first_page = oldest // block
            pages = table[first_page : -(-end // block)]
            decode = _Decode(row, pages, oldest - first_page * block, end - first_page * block)
            # Powers of two: padding reads at most twice what is needed, and there are few groups.
            buckets.setdefault((len(pages) - 1).bit_length(), []).append(decode)
        return [self._group(bucket) for bucket in buckets.values()]

    def _group(self, bucket: list[_Decode]) -> DecodeGroup:
        width = max(len(decode.table) for decode in bucket)
        num_keys = max(decode.high for decode in bucket)
        pages = np.stack([np.pad(decode.table, (0, width - len(decode.table)), mode="edge") for decode in bucket])
        mask = None
        if any(decode.low > 0 or decode.high < num_keys for decode in bucket):
            key = torch.arange(num_keys)[None]
            low = torch.tensor([decode.low for decode in bucket])[:, None]
            high = torch.tensor([decode.high for decode in bucket])[:, None]
            mask = self._additive((key >= low) & (key < high))[:, None, None]
        rows = torch.tensor([decode.row for decode in bucket])
        return DecodeGroup(rows, torch.from_numpy(pages.reshape(-1) * self.kv.page_stride), num_keys, mask)
