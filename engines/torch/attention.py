"""Attention over paged KV, plugged into transformers' attention interface.

Owns the arithmetic of one layer on one ragged batch: write the new K and V by slot, then attend over gathered pages.
No mask function is registered under our name, so transformers builds no masks; the step brings its own.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from transformers import AttentionInterface

from engines.torch.step_batch import DecodeGroup, PrefillPart, StepBatch

ATTENTION_NAME = "kvferry_paged"


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers, before `model.set_attn_implementation` of it. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    *,
    paged_step: StepBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """One layer's attention for the whole step; writes the layer's new rows of `paged_step.kv`.

    `query` is [1, heads, tokens, head_dim], `key` and `value` [1, kv_heads, tokens, head_dim], after RoPE. Returns
    [1, tokens, heads, head_dim]. Called by transformers, which hands down keywords of the model's forward.
    """
    layer: int = module.layer_idx
    kv = paged_step.kv
    num_heads, num_tokens, head_dim = query.shape[1:]
    for rows, fresh in zip(kv.rows[layer], (key, value), strict=True):
        rows.index_copy_(0, paged_step.slots, fresh[0].transpose(0, 1).reshape(num_tokens, -1))
    out = query.new_empty(1, num_tokens, num_heads, head_dim)
    plan = paged_step.plan(sliding_window)
    for group in plan.decodes:
        _attend_decodes(group, query, kv.pages[layer], kv_heads=key.shape[1], scaling=scaling, out=out)
    for part in plan.prefills:
        _attend_prefill(part, query, (key, value), kv.pages[layer], scaling=scaling, out=out)
    return out, None


def _gather(
    pages: torch.Tensor, index: torch.Tensor, *, num_sequences: int, num_keys: int, kv_heads: int, head_dim: int
) -> torch.Tensor:
    """[num_sequences, kv_heads, num_keys, head_dim] out of whole pages."""
    rows = pages.index_select(0, index).view(num_sequences, -1, kv_heads, head_dim)
    return rows[:, :num_keys].transpose(1, 2)


def _attend_decodes(
    group: DecodeGroup,
    query: torch.Tensor,
    pages: tuple[torch.Tensor, torch.Tensor],
    *,
    kv_heads: int,
    scaling: float | None,
    out: torch.Tensor,
) -> None:
    num_heads, head_dim, count = query.shape[1], query.shape[3], len(group.rows)
    keys, values = (
        _gather(page, group.pages, num_sequences=count, num_keys=group.num_keys, kv_heads=kv_heads, head_dim=head_dim)
        for page in pages
    )
    # The query heads that share a key head stand as rows of one matrix: nothing is repeated for grouped queries.
    queries = query[0].transpose(0, 1).index_select(0, group.rows).view(count, kv_heads, -1, head_dim)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask, scale=scaling)
    out[0].index_copy_(0, group.rows, attended.reshape(count, num_heads, head_dim))


def _attend_prefill(
    part: PrefillPart,
    query: torch.Tensor,
    fresh: tuple[torch.Tensor, torch.Tensor],
    pages: tuple[torch.Tensor, torch.Tensor],
    *,
    scaling: float | None,
    out: torch.Tensor,
) -> None:
    span = slice(part.row, part.row + part.count)
    kv_heads, head_dim = fresh[0].shape[1], query.shape[3]
    if part.pages is None:
        keys, values = (tensor[:, :, span] for tensor in fresh)
    else:
        keys, values = (
            _gather(page, part.pages, num_sequences=1, num_keys=part.num_keys, kv_heads=kv_heads, head_dim=head_dim)
            for page in pages
        )
    attended = F.scaled_dot_product_attention(
        query[:, :, span],
        keys,
        values,
        attn_mask=part.mask,
        is_causal=part.mask is None,
        scale=scaling,
        enable_gqa=kv_heads != query.shape[1],
    )
    out[:, span] = attended.transpose(1, 2)
