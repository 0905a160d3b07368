"""Tiny seeded random checkpoints in Hugging Face format, with a real tokenizer, made when a test asks for them."""

from __future__ import annotations  # to load transformers' models when they are used, and not before

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 512
MAX_CONTEXT = 512
KINDS = ("llama", "mistral", "mistral_sliding", "qwen2", "qwen3")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = ["the quick brown fox jumps over the lazy dog", "a prompt goes in and tokens come out", "keys and values"]
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_CONTEXT,
    "initializer_range": 0.08,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_tiny_model(
    kind: str, folder: Path, *, seed: int = 0, max_context: int = MAX_CONTEXT, head_dim: int = 16
) -> Path:
    """Write a checkpoint of `kind` (one of KINDS) into `folder` and return it. Equal arguments give equal bytes."""
    config = _config(kind, _SHAPE | {"max_position_embeddings": max_context, "head_dim": head_dim})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, config.architectures[0])(config)
    model.save_pretrained(folder)
    _tokenizer(max_context).save_pretrained(folder)
    return folder


def _config(kind: str, shape: Mapping[str, object]) -> transformers.PreTrainedConfig:
    if kind == "llama":
        return transformers.LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
    if kind == "mistral":
        return transformers.MistralConfig(**shape, sliding_window=None, architectures=["MistralForCausalLM"])
    if kind == "mistral_sliding":
        return transformers.MistralConfig(**shape, sliding_window=48, architectures=["MistralForCausalLM"])
    if kind == "qwen2":
        return transformers.Qwen2Config(**shape, architectures=["Qwen2ForCausalLM"])
    if kind == "qwen3":
        return transformers.Qwen3Config(**shape, architectures=["Qwen3ForCausalLM"])
    raise ValueError(f"no tiny model of kind {kind!r}")


def _tokenizer(max_context: int) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_context,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
