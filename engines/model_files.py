"""A model folder in Hugging Face format, checked before anything is loaded from it. No torch here.

Owns finding the folder (local first, then the hub) and saying what is wrong with it: each complaint names the file, its
path and what to do. transformers loads leniently, so whatever is not refused here or in `model` would be served wrong.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcore.errors import ModelLoadError
from kvcore.model_folder import DOWNLOAD_AGAIN, find_folder, read_json

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""The architectures that are served, each with the `model_type` of its config.json."""
# Their frequencies depend on the sequence's length, so cached K would be wrong once a sequence grows.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A folder that passed the checks."""

    folder: Path
    architecture: str
    weight_files: tuple[Path, ...]
    """Sorted by name."""
    num_parameters: int
    """Elements stored in the weight files."""

    @property
    def tokenizer_file(self) -> Path:
        """`tokenizer.json`, which exists."""
        return self.folder / "tokenizer.json"


def check_model_files(path: str) -> ModelFiles:
    """Find and check the model at `path`: a folder, or else a hub id (`owner/name`), which is downloaded if need be.

    Reads the JSON files and the headers of the weight files, not the weights. Raises ModelLoadError.
    """
    folder = find_folder(path)
    config = read_json(folder / "config.json", "it describes the architecture")
    architecture = _check_architecture(folder / "config.json", config)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ModelLoadError(
            f"tokenizer.json is missing: {tokenizer}. kvferry needs the fast tokenizer's file; make it with "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`"
        )
    read_json(tokenizer, "it is the tokenizer")
    weight_files = _find_weights(folder)
    num_parameters = sum(_count_parameters(file) for file in weight_files)
    return ModelFiles(folder, architecture, weight_files, num_parameters)


def _check_architecture(file: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in MODEL_TYPES:
        supported = ", ".join(MODEL_TYPES)
        raise ModelLoadError(f"unsupported architecture {architecture!r} in {file}. Supported: {supported}")
    _check_read_as_meant(file, config, architecture)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if kind in _LENGTH_DEPENDENT_ROPE:
        raise ModelLoadError(
            f"unsupported RoPE type {kind!r} in {file}: its frequencies change with the length of a sequence, so its "
            "KV cannot be reused. Serve a model with default, linear, llama3 or yarn RoPE"
        )
    return str(architecture)


def _check_read_as_meant(file: Path, config: dict[str, Any], architecture: str) -> None:
    """Refuse what the architecture's code would leave out in silence, or fail on after minutes of loading."""
    expected, given = MODEL_TYPES[architecture], config.get("model_type", "missing")
    if given != expected:
        raise ModelLoadError(
            f"{file} contradicts itself: architectures says {architecture}, whose model_type is {expected!r}, but "
            f"model_type is {given!r}. {DOWNLOAD_AGAIN.capitalize()}, or correct what is wrong of the two"
        )
    if architecture == "LlamaForCausalLM" and config.get("sliding_window") is not None:
        raise ModelLoadError(
            f"{file} has a sliding_window, which {architecture} ignores: answers beyond the window would be wrong. "
            "Correct architectures and model_type, or remove sliding_window"
        )
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelLoadError(
            f"{file} says that the weights are quantized ({method or 'by an unnamed method'}): the torch engine does "
            "not serve quantized weights. Serve the folder with engine.kind vllm, or use unquantized weights"
        )


def _find_weights(folder: Path) -> tuple[Path, ...]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = read_json(index, "it names the weight files").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelLoadError(f"{_INDEX} is corrupt: {index} has no weight_map of file names. {DOWNLOAD_AGAIN}")
        files = tuple(folder / name for name in sorted(set(weight_map.values())))
        for file in files:
            if file.parent != folder or not file.is_file():
                raise ModelLoadError(
                    f"weight file {file.name} is missing: {index} names it, {file} is not there. {DOWNLOAD_AGAIN}"
                )
        if files:
            return files
    single = folder / _SINGLE
    if single.is_file():
        return (single,)
    if any(folder.glob("*.bin")):
        raise ModelLoadError(
            f"{_SINGLE} is missing: {single}. The folder has weights in PyTorch's pickle format, which is not loaded "
            "because it can run code; convert it with `model.save_pretrained(folder)` of transformers"
        )
    raise ModelLoadError(f"the weights are missing: neither {single} nor {_INDEX} is there. {DOWNLOAD_AGAIN}")


def _count_parameters(file: Path) -> int:
    return sum(_tensor_sizes(file))


def _tensor_sizes(file: Path) -> Iterator[int]:
    """Elements of each tensor of a safetensors file: u64le header length, JSON header, then the data, fully covered.

    (https://huggingface.co/docs/safetensors, "Format")
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, size)))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        data_bytes = max((entry["data_offsets"][1] for entry in tensors), default=0)
        if 8 + length + data_bytes != size:
            raise ValueError(f"it has {size} bytes and its header speaks of {8 + length + data_bytes}")
        for entry in tensors:
            elements = 1
            for extent in entry["shape"]:
                elements *= extent
            yield elements
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelLoadError(
            f"weight file {file.name} is truncated or corrupt: {file}: {error}. {DOWNLOAD_AGAIN}"
        ) from error
