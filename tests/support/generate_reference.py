"""What transformers' own `generate` says, greedily, token by token.

A divergence is accepted only where the reference itself is at a tie: its two best logits there, on the common tokens,
lie closer than TIE (batching and re-chunking move float32 logits by up to 1e-4).
"""

from __future__ import annotations  # to load transformers' models when they are used, and not before

from pathlib import Path

import torch
import transformers

TIE = 2e-4
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain how a bicycle stays upright.",
    "List three prime numbers.",
    "Translate to German: good morning.",
    "Who wrote Hamlet?",
    "def fibonacci(n):",
    "Once upon a time, in a land far away,",
    "The quick brown fox " * 30,
    "Name the planets of the solar system.",
]


def load_reference(folder: Path) -> transformers.PreTrainedModel:
    """Without an end-of-sequence token: it is a token like any other then, as with `ignore_eos`."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    return reference


def assert_identical(reference: transformers.PreTrainedModel, prompt: list[int], output: list[int]) -> None:
    ids = torch.tensor([prompt])
    expected = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=len(output),
        do_sample=False,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    if output == expected:
        return
    first = next(i for i, pair in enumerate(zip(output, expected, strict=True)) if pair[0] != pair[1])
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + expected[:first]])).logits[0, -1]
    gap = float(logits[expected[first]] - logits[output[first]])
    assert abs(gap) < TIE, (
        f"prompt of {len(prompt)}: token {first} is {output[first]}, not {expected[first]}; gap {gap}"
    )
