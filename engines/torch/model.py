"""Loads a checkpoint with transformers, ready for paged attention, and refuses one that is not exactly right.

Owns the strictness that transformers lacks: a missing, unexpected or misshapen tensor is an error here. Invariant: the
returned model is in eval mode on the CPU and every attention layer of it runs our attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from engines.model_files import ModelFiles, check_model_files
from engines.provenance import FileStamp
from engines.torch.attention import ATTENTION_NAME, register_attention
from engines.torch.kv_cache import KVGeometry
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvcore.errors import ConfigError, ModelLoadError
from kvcore.model_folder import read_json

_AGAIN = "Download or convert the model again"
_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with what the engine must know of it."""

    files: ModelFiles
    stamps: Mapping[Path, FileStamp]
    """Of the weight files, from before they were read."""
    model: Any
    """A transformers `PreTrainedModel`: the one place where its untyped world is held."""
    geometry: KVGeometry
    max_context: int
    """The model's own or the configuration's, whichever is lower."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    rope_frequencies: torch.Tensor
    """[head_dim / 2] radians a position."""


def model_dtype(name: str) -> torch.dtype:
    """The dtype of `model.dtype`. Raises ConfigError."""
    if name not in _DTYPES:
        raise ConfigError(f"model.dtype: {name!r} is none of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_model(model: ModelConfig, engine: TorchEngineConfig) -> LoadedModel:
    """Check and load the model; takes seconds and blocks. Raises ModelLoadError, ConfigError."""
    dtype = model_dtype(model.dtype)
    files = check_model_files(model.path)
    return load_checked(files, model, engine, dtype)


def load_checked(files: ModelFiles, model: ModelConfig, engine: TorchEngineConfig, dtype: torch.dtype) -> LoadedModel:
    """As `load_model`, of files that were checked already."""
    stamps = {file: FileStamp.of(file) for file in files.weight_files}
    loaded = _from_pretrained(files, dtype)
    _copy_weights(loaded)
    config = loaded.config
    register_attention()
    loaded.set_attn_implementation(ATTENTION_NAME)
    loaded.eval()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LoadedModel(
        files=files,
        stamps=stamps,
        model=loaded,
        geometry=KVGeometry(
            num_layers=config.num_hidden_layers,
            block_size=engine.block_size,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            dtype=dtype,
        ),
        max_context=_max_context(config.max_position_embeddings, model.max_context),
        vocab_size=config.vocab_size,
        eos_token_ids=_eos_token_ids(files, config.eos_token_id),
        rope_frequencies=loaded.model.rotary_emb.inv_freq.float().clone(),
    )


def _from_pretrained(files: ModelFiles, dtype: torch.dtype) -> Any:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded, report = getattr(transformers, files.architecture).from_pretrained(
            files.folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported by name; they are refused below
        )
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"the weights in {files.folder} cannot be read: {error}. Download the model again"
        ) from error
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
        StrictDataclassError,
    ) as error:
        raise ModelLoadError(
            f"{files.folder / 'config.json'} describes no model that can be built: {error}. {_AGAIN}"
        ) from error
    for kind, what in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "have unexpected"),
        ("mismatched_keys", "have other shapes than config.json says for"),
        ("error_msgs", "could not be converted for"),
    ):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelLoadError(
                f"the weights in {files.folder} {what} {', '.join(names[:3])}{more}: config.json and weight files "
                f"are not of the same model. {_AGAIN}"
            )
    return loaded


def _copy_weights(model: Any) -> None:
    """Into memory of this process. `from_pretrained` maps the files where it need not convert them, and what writes
    over such a file changes the running model, whose digest says that it is the old one still."""
    for parameter in model.parameters():  # one that is used twice is given once
        parameter.data = parameter.data.clone()


def _max_context(own: int, wanted: int | None) -> int:
    if wanted is None:
        return own
    if not 1 <= wanted <= own:
        raise ConfigError(f"model.max_context: {wanted} does not lie in 1..{own}, which is what the model was made for")
    return wanted


def _eos_token_ids(files: ModelFiles, from_config: int | list[int] | None) -> tuple[int, ...]:
    """generation_config.json has the chat model's full list where config.json often has one of them."""
    generation = files.folder / "generation_config.json"
    named = read_json(generation, "its eos_token_id ends a text").get("eos_token_id") if generation.is_file() else None
    ids = named if named is not None else from_config
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
