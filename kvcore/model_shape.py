"""What a model's config.json, in Hugging Face format, says of its KV, whatever its architecture. Pure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvcore.errors import ModelLoadError


class KVShape(NamedTuple):
    """A token's KV: a key and a value of `head_dim` numbers for each head of each layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a model of several kinds of input what is about text; else all."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def kv_shape(model: Mapping[str, Any], file: Path) -> KVShape:
    """Of a text part. `file`: where it was read. Raises ModelLoadError."""
    heads = number_in(model, "num_attention_heads", file)
    return KVShape(
        num_layers=number_in(model, "num_hidden_layers", file),
        num_kv_heads=model.get("num_key_value_heads") or heads,
        head_dim=model.get("head_dim") or number_in(model, "hidden_size", file) // heads,
    )


def number_in(model: Mapping[str, Any], name: str, file: Path) -> int:
    """A number from 1 on that must be there. Raises ModelLoadError."""
    value = model.get(name)
    if not isinstance(value, int) or value < 1:
        raise ModelLoadError(f"{file} has no {name}: is it a language model in Hugging Face format?")
    return value
