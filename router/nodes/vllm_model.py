"""What the router must know of the model behind vLLM servers that are not ours, read from the model's folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvcore.config.schema import ClusterConfig
from kvcore.model_folder import find_folder, read_json
from kvcore.model_shape import kv_shape, number_in, text_part
from kvcore.types import KVSpec

_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`kv_spec` is the same for all servers of a cluster, so that they are paired; whether their bytes really fit each
    other is told by vLLM's connectors when they meet. Its unit is one token: they hand over prompts of any length."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_spec: KVSpec


def read_model_facts(config: ClusterConfig) -> ModelFacts:
    """From `config.json` and `generation_config.json` of `model.path`. Blocking. Raises ModelLoadError."""
    folder = find_folder(config.model.path, _FILES)
    file = folder / "config.json"
    model = text_part(read_json(file, "it describes the model"))
    shape = kv_shape(model, file)
    return ModelFacts(
        vocab_size=number_in(model, "vocab_size", file),
        eos_token_ids=_eos_token_ids(folder, model),
        kv_spec=KVSpec(
            model_id=config.model.name,
            weights_digest="config." + sha256(file.read_bytes()).hexdigest()[:32],
            tokenizer_digest="",
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=str(model.get("dtype") or model.get("torch_dtype") or "auto"),
            attention=str(model.get("model_type")),
            layout_id=f"vllm.{config.handoff}",
            chunk_tokens=1,
            chunk_bytes=0,
        ),
    )


def _eos_token_ids(folder: Path, model: Mapping[str, Any]) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    named = read_json(file, "its eos_token_id ends a text").get("eos_token_id") if file.is_file() else None
    if named is None:
        named = model.get("eos_token_id")
    return tuple(named if isinstance(named, list) else [] if named is None else [named])
