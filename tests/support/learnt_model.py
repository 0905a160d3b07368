"""A tiny Qwen3 that knows a few texts by heart: what it answers greedily has a meaning, and is far from a tie.

Its template and tokenizer have tools and reasoning, as Qwen3's. Learning takes some seconds of one core.
"""

from __future__ import annotations  # to load transformers' models when they are used, and not before

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from support.tiny_models import VOCAB_SIZE, make_tiny_model
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TEMPLATE = Path(__file__).with_name("chat_templates") / "qwen3_thinking.jinja"
THOUGHT = "<think>\n{}\n</think>\n\n"
_IGNORED = -100
_RATE = 1e-2


def make_learnt_model(
    folder: Path,
    chats: Sequence[tuple[dict[str, object], str]],
    texts: Sequence[tuple[str, str]],
    *,
    max_context: int = 1024,
    steps: int = 50,
) -> Path:
    """Write it into `folder` and return that. `chats`: (values of the template, the whole answer); `texts`: (prompt,
    how it goes on).

    Raises AssertionError if it has not learnt all of them.
    """
    template = TEMPLATE.read_text()
    make_tiny_model("qwen3", folder, max_context=max_context, head_dim=64)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    lessons = [
        (
            tokenizer.apply_chat_template(**values, chat_template=template, add_generation_prompt=True, tokenize=False),
            answer + "<|im_end|>",
        )
        for values, answer in chats
    ]
    # Prompts of few tokens are learnt in seconds. What is not ASCII stays in pieces of single bytes.
    words = [ascii(text) for lesson in lessons for text in lesson]
    tokenizer = tokenizer.train_new_from_iterator(words, VOCAB_SIZE - len(MARKS), show_progress=False)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    _teach(folder, [(_ids(tokenizer, prompt), _ids(tokenizer, answer)) for prompt, answer in [*lessons, *texts]], steps)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _teach(folder: Path, lessons: Sequence[tuple[list[int], list[int]]], steps: int) -> None:
    longest = max(len(prompt) + len(answer) for prompt, answer in lessons)
    inputs = torch.zeros(len(lessons), longest, dtype=torch.long)
    labels = torch.full_like(inputs, _IGNORED)
    for row, (prompt, answer) in enumerate(lessons):
        whole = torch.tensor([*prompt, *answer])
        inputs[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for _ in range(steps):
            loss = model(input_ids=inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        known = model(input_ids=inputs).logits.argmax(-1)[:, :-1] == labels[:, 1:]
    assert bool((known | (labels[:, 1:] == _IGNORED)).all()), f"not learnt; loss {loss.item():.3f}"
    model.save_pretrained(folder)
