"""A Llama's or Qwen2's forward pass in plain torch, any rows of it over any KV, to measure ways to reuse documents.

Float32, one sequence, nothing paged. CacheBlend (arXiv 2405.16444) is done as LMCache 0.5.6 does it: layers before the
check layer are computed for all tokens; there, the rows whose keys moved most are chosen, and go on alone.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each layer, [tokens, kv heads, head dim]."""
CHECK_LAYER = 1


class Reference:
    """The model of a folder in Hugging Face's format. Only plain RoPE."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        rope = config.get("rope_parameters") or config
        self._weights = load_file(folder / "model.safetensors")
        self.num_layers = config["num_hidden_layers"]
        self._epsilon = config["rms_norm_eps"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        pairs = torch.arange(0, self.head_dim, 2).float()
        self._frequencies = 1.0 / rope["rope_theta"] ** (pairs / self.head_dim)
        self._embedding = self._weights["model.embed_tokens.weight"].float()
        self._head = self._weights.get("lm_head.weight", self._embedding).float()

    def prefill(self, ids: Sequence[int]) -> tuple[Layers, torch.Tensor]:
        """KV of all tokens, and what the last one says of the next: log-probabilities, [vocabulary]."""
        rows = torch.arange(len(ids))
        empty = [(torch.empty(0), torch.empty(0))] * self.num_layers
        return self._run(self._embedding[torch.tensor(ids)], rows, lambda _layer, k, v: (k, v), empty, 0)

    def patch(self, ids: Sequence[int], kv: Layers, rows: torch.Tensor) -> tuple[Layers, torch.Tensor]:
        """As `prefill`, with only `rows` computed, sorted and the last one among them, into `kv` of all tokens."""
        return self._patch(self._embedding[torch.tensor(ids)[rows]], kv, rows, 0)

    def blend(self, ids: Sequence[int], kv: Layers, ratio: float, context: int) -> tuple[Layers, torch.Tensor]:
        """CacheBlend: that share of the first `context` tokens is computed into `kv`, and all of the rest."""
        every = torch.arange(len(ids))
        hidden, out = self._embedding[torch.tensor(ids)], []
        for layer in range(CHECK_LAYER):
            q, k, v = self._qkv(layer, hidden, every)
            out.append((k, v))
            hidden = self._rest(layer, hidden, q, every, (k, v))
        _, k, _ = self._qkv(CHECK_LAYER, hidden, every)
        moved = (k[:context] - kv[CHECK_LAYER][0][:context]).pow(2).sum((1, 2))
        chosen = moved.topk(int(context * ratio)).indices.sort().values
        rows = torch.cat((chosen, every[context:]))
        return self._patch(hidden[rows], out + kv[CHECK_LAYER:], rows, CHECK_LAYER)

    def follow(self, each: Sequence[Layers], tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities behind each of `tokens`, which stand behind every KV of `each`, all of one length.

        [KVs, tokens, vocabulary]. At once: it takes as long as the weights take to be read, once.
        """
        rows = torch.arange(len(each[0][0][0]), len(each[0][0][0]) + len(tokens))
        hidden = self._embedding[torch.tensor(tokens)].expand(len(each), -1, -1)
        for layer in range(self.num_layers):
            q, *new = self._qkv(layer, hidden, rows)
            before = zip(*(kv[layer] for kv in each), strict=True)
            every_k, every_v = (torch.cat((torch.stack(old), fresh), 1) for old, fresh in zip(before, new, strict=True))
            hidden = self._rest(layer, hidden, q, rows, (every_k, every_v))
        return self._said(hidden)

    def greedy(self, kv: Layers, said: torch.Tensor, count: int) -> list[int]:
        """The likeliest `count` tokens behind `kv`, of which the first comes from `said`."""
        tokens = [int(said.argmax())]
        while len(tokens) < count:
            tokens.append(int(self.follow([kv], tokens)[0, -1].argmax()))
        return tokens

    def turned(self, keys: torch.Tensor, distance: int) -> torch.Tensor:
        """K of tokens that stand `distance` further than where it was computed."""
        return self._turn(keys, torch.tensor([distance]))

    def _patch(self, hidden: torch.Tensor, kv: Layers, rows: torch.Tensor, first: int) -> tuple[Layers, torch.Tensor]:
        def joined(layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            every_k, every_v = kv[layer]
            every_k[rows], every_v[rows] = k, v
            return every_k, every_v

        return self._run(hidden, rows, joined, kv, first)

    def _run(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        joined: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        kv: Layers,
        first: int,
    ) -> tuple[Layers, torch.Tensor]:
        out = kv[:first]
        for layer in range(first, self.num_layers):
            q, k, v = self._qkv(layer, hidden, rows)
            out.append(joined(layer, k, v))
            hidden = self._rest(layer, hidden, q, rows, out[-1])
        return out, self._said(hidden[-1:])[0]

    def _norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self._epsilon) * self._weights[name]

    def _turn(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions.float()[:, None] * self._frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        low, high = heads.chunk(2, -1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)

    def _qkv(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        at = f"model.layers.{layer}."
        normed = self._norm(hidden, f"{at}input_layernorm.weight")
        q, k, v = (
            functional.linear(
                normed,
                self._weights[f"{at}self_attn.{name}_proj.weight"],
                self._weights.get(f"{at}self_attn.{name}_proj.bias"),
            ).view(*hidden.shape[:-1], -1, self.head_dim)
            for name in "qkv"
        )
        return self._turn(q, positions), self._turn(k, positions), v

    def _rest(
        self,
        layer: int,
        hidden: torch.Tensor,
        q: torch.Tensor,
        rows: torch.Tensor,
        kv: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        (every_k, every_v), at = kv, f"model.layers.{layer}."
        whole = len(rows) == every_k.shape[-3]
        mask = None if whole else torch.arange(every_k.shape[-3])[None] <= rows[:, None]
        queries, keys, values = (heads.view(-1, *heads.shape[-3:]).transpose(1, 2) for heads in (q, every_k, every_v))
        seen = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=whole, enable_gqa=True
        ).transpose(1, 2)
        hidden = hidden + functional.linear(
            seen.reshape(*hidden.shape[:-1], -1), self._weights[f"{at}self_attn.o_proj.weight"]
        )
        normed = self._norm(hidden, f"{at}post_attention_layernorm.weight")
        gate, up, down = (self._weights[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return hidden + functional.linear(
            functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up), down
        )

    def _said(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = functional.linear(self._norm(hidden, "model.norm.weight"), self._head)
        return logits.log_softmax(-1)
