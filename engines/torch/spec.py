"""The provenance of the torch engine's KV: everything that K and V bytes depend on, as a `KVSpec`."""

import json
from pathlib import Path

from engines.provenance import DIGEST_CACHE, check_unchanged, weights_digest
from engines.torch.model import LoadedModel
from kvcore.model_folder import file_digest
from kvcore.types import DeclaredKV, KVSpec

# Of config.json, what K and V depend on beside the weights. Max positions do not matter: RoPE types that use them
# are refused or name them in rope_parameters.
_ATTENTION_KEYS = (
    "architectures",
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "mlp_bias",
    "num_attention_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
)


def build_kv_spec(
    loaded: LoadedModel,
    model_id: str,
    chunk_tokens: int,
    declared: DeclaredKV = (),
    *,
    digest_cache: Path | None = DIGEST_CACHE,
) -> KVSpec:
    """The spec of `loaded`'s KV. Reads all weights unless `digest_cache` knows them (None: no cache). Blocks.

    Raises ModelLoadError if a weight file was written since the model was loaded: its digest is not the model's.
    """
    geometry, files = loaded.geometry, loaded.files
    digest = weights_digest(files.weight_files, digest_cache)
    check_unchanged(loaded.stamps)
    dtype = str(geometry.dtype).removeprefix("torch.")
    return KVSpec(
        model_id=model_id,
        weights_digest=digest,
        tokenizer_digest=file_digest(files.tokenizer_file),
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        dtype=dtype,
        attention=attention_text(loaded.model.config.to_dict()),
        layout_id=geometry.layout_id,
        chunk_tokens=chunk_tokens,
        chunk_bytes=chunk_tokens * geometry.token_bytes,
        declared=tuple(sorted((("engine.block_size", str(geometry.block_size)), ("model.dtype", dtype), *declared))),
    )


def attention_text(config: dict[str, object]) -> str:
    """Canonical JSON of the settings that K and V depend on."""
    chosen = {key: config[key] for key in _ATTENTION_KEYS if config.get(key) is not None}
    return json.dumps(chosen, sort_keys=True, separators=(",", ":"))
