"""A model of 12.6 million parameters with seeded random weights, as a Hugging Face folder: big enough that prefill is
work, small enough that 8,000 tokens take seconds on one core. 20 KiB of KV a token in float32: 164 MB at 8,000 tokens.

Its tokenizer is a list of words: prompts are token ids, and nobody reads the answers.
"""

import argparse
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 8192
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint; equal seeds give equal bytes."""
    config = transformers.Qwen3Config(**SHAPE, architectures=["Qwen3ForCausalLM"])
    torch.manual_seed(seed)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", pad_token="w0", unk_token="w0"
    ).save_pretrained(folder)
    return folder


def main() -> None:
    """Run by benchmarks.vllm_pd with the interpreter that has torch and transformers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    make_model(parser.parse_args().folder)


if __name__ == "__main__":
    main()
