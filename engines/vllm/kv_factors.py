"""What vLLM interprets without its showing in a KV tensor: the factors that a KVSpec declares. One table, pure.

Those of NIXL's compatibility hash are among them, but for what kvferry has once and for all (one kind of KV, its own
transfer) and what a KVSpec has as fields (heads, head size, layers).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One attention layer, as vLLM built it."""

    cache_dtype: str
    """As `--kv-cache-dtype`, still `auto` or an alias."""
    backend: str


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """A vLLM whose model is loaded. `config`: its VllmConfig."""

    config: Any
    version: str
    platform: str
    fp8: str
    """What this platform's kernels take fp8 for, e.g. `float8_e4m3fn`."""
    layers: tuple[LayerFacts, ...]


_ALIASES = {"fp8": "fp8_e4m3", "half": "float16", "float": "float32"}


def resolved_cache_dtype(name: str, model_dtype: str, fp8: str) -> str:
    """One name for each way to read a KV tensor. A name that is not known here stands for itself.

    `auto` is the model's dtype; `fp8` is fp8_e4m3, of which some platforms have their own kind.
    """
    name = model_dtype if name == "auto" else _ALIASES.get(name, name)
    return f"{name}fnuz" if name == "fp8_e4m3" and fp8.endswith("fnuz") else name


def _cache_dtype(facts: EngineFacts) -> str:
    """Of all layers, in their order, if they differ."""
    names = [resolved_cache_dtype(layer.cache_dtype, _dtype(facts), facts.fp8) for layer in facts.layers]
    return names[0] if len(set(names)) == 1 else ",".join(names)


def _dtype(facts: EngineFacts) -> str:
    return str(facts.config.model_config.dtype).removeprefix("torch.")


def _long_rope(facts: EngineFacts) -> str:
    """LongRoPE takes its long factors for every token once the context may be longer than the original one."""
    model = facts.config.model_config
    hf = model.hf_text_config
    rope = getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return "any"
    original = rope.get("original_max_position_embeddings") or getattr(hf, "original_max_position_embeddings", 0)
    return f"{'over' if model.max_model_len > original else 'up to'} {original}"


def _speculative(facts: EngineFacts) -> str:
    """A speculator with KV of its own, whose layers lie in the same blocks. Others (ngram, ...) leave no trace."""
    speculative = facts.config.speculative_config
    if speculative is None or not speculative.uses_draft_kv_cache():
        return "none"
    draft = speculative.draft_model_config
    text = json.dumps([draft.hf_config.to_dict(), draft.revision, draft.code_revision], sort_keys=True, default=str)
    return f"{speculative.method} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


KV_FACTORS: Mapping[str, Callable[[EngineFacts], object]] = {
    "attention-backend": lambda facts: ",".join(sorted({layer.backend for layer in facts.layers})),
    "block-size": lambda facts: facts.config.cache_config.block_size,
    "disable-sliding-window": lambda facts: facts.config.model_config.disable_sliding_window,
    "dtype": _dtype,
    "kv-cache-dtype": _cache_dtype,
    "max-model-len": _long_rope,
    "model-impl": lambda facts: facts.config.model_config.architecture,
    "platform": lambda facts: facts.platform,
    "quantization": lambda facts: facts.config.model_config.quantization,
    "speculative-config": _speculative,
    "vllm": lambda facts: facts.version,
}
"""Name, as among vLLM's arguments where it is one -> its value. Two engines whose values differ in one row never share
KV. `max-model-len` counts only where the model's RoPE depends on it."""


def declared_factors(facts: EngineFacts) -> tuple[tuple[str, str], ...]:
    """KVSpec's `declared` of an engine."""
    return tuple((name, str(factor(facts))) for name, factor in sorted(KV_FACTORS.items()))
