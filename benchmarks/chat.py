"""A chat about a long document across nodes, stopped and started again in the middle: the first token of each turn.

The demo model on the torch engine, one prefiller and two decoders: real processes on one machine. Each turn's prompt is
the whole chat so far; after half of the turns the whole cluster is stopped and started again. Three times, by turns:

- none: every turn has a salt of its own, so nothing is reused, as without a store;
- memory: the store, and no tier: the turn after the restart begins anew;
- disk: the store and a disk tier.

All have to give the same tokens.

Run: OMP_NUM_THREADS=1 python -m benchmarks.chat [--rounds 3]
"""

import argparse
import asyncio
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.tiers import prepared
from benchmarks.tiers_cluster import Cluster, Engine, cluster
from benchmarks.vllm_pd_client import Measured, ask
from benchmarks.vllm_pd_processes import Setting
from kvferry.demo.document import document
from kvferry.demo.model import prepare_demo_model

QUESTIONS = (
    "In two sentences: why did the village build the second ferry?",
    "Who wrote down first what was going wrong?",
    "What are the two boats called?",
    "What did the council vote for, and when?",
    "What did the merchant build on the south bank?",
    "Who keeps the tide book, and what is written in it?",
)
CHUNK = 64
KV_BYTES = 46_080
"""Of one token of the demo model, in float32."""
ROLES = ("prefiller", "decoder", "decoder")


@dataclass(frozen=True)
class Chat:
    """What is said."""

    tokenizer: Tokenizer
    document_words: int
    """Of the document, from its start."""
    turns: int
    answer_tokens: int

    def opening(self) -> list[int]:
        """Up to the first question."""
        text = " ".join(document().split(" ")[: self.document_words])
        return self._ids(f"<|im_start|>system\nAnswer from this text.\n\n{text}<|im_end|>\n")

    def question(self, turn: int) -> list[int]:
        """Up to where the answer begins."""
        asked = QUESTIONS[turn % len(QUESTIONS)]
        return self._ids(f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n")

    def ending(self) -> list[int]:
        """Behind an answer."""
        return self._ids("<|im_end|>\n")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


async def play(setting: Setting, chat: Chat, tiers: Mapping[str, Any], *, reuse: bool) -> list[Measured]:
    """Each turn's answer, with a restart in the middle."""
    room = KV_BYTES * (2048 + chat.turns * (chat.answer_tokens + 64))
    section = {"kind": "torch", "threads": 1, "block_size": CHUNK, "kv_cache": 2 * room}
    engine = Engine(python=Path(sys.executable), section=section, chunk_tokens=CHUNK, roles=ROLES)
    prompt, answers = chat.opening(), list[Measured]()
    for turns in (range(chat.turns // 2), range(chat.turns // 2, chat.turns)):
        async with cluster(setting, engine, tiers, segment_bytes=2 * room) as subject:
            for turn in turns:
                prompt += chat.question(turn)
                answers.append(await _ask(subject, prompt, chat.answer_tokens, None if reuse else f"turn {turn}"))
                prompt += [*answers[-1].token_ids, *chat.ending()]
            if turns.start == 0:
                await subject.until_saved(tiers, (len(prompt) - len(chat.ending()) - 1) // CHUNK)
    return answers


async def _ask(subject: Cluster, prompt: Sequence[int], max_tokens: int, salt: str | None) -> Measured:
    fields = {} if salt is None else {"cache_salt": salt}
    return await ask(subject.setting.session, subject.url, list(prompt), max_tokens=max_tokens, **fields)


async def run(options: argparse.Namespace) -> None:
    """Print the table and RESULT."""
    model = await asyncio.to_thread(prepare_demo_model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    chat = Chat(tokenizer, options.words, options.turns, options.answer_tokens)
    ttft: dict[str, list[list[float]]] = {"none": [], "memory": [], "disk": []}
    cached: dict[str, list[int | None]] = {}
    said: list[tuple[int, ...]] | None = None
    for nth in range(options.rounds):
        for name, rows in ttft.items():
            async with prepared(model, 4096 * KV_BYTES) as setting:
                disk = {"path": str(setting.folder / "disk"), "size": 2 << 30}
                tiers = {"disk": disk} if name == "disk" else {}
                answers = await play(setting, chat, tiers, reuse=name != "none")
            tokens = [answer.token_ids for answer in answers]
            said = said or tokens
            if tokens != said:
                raise RuntimeError(f"{name}, round {nth}: the answers are others")
            rows.append([answer.ttft_s for answer in answers])
            cached[name] = [answer.cached_tokens for answer in answers]
            print(f"round {nth} {name:7}" + "".join(f"{answer.ttft_s:8.2f}" for answer in answers), flush=True)
    medians = {
        name: [round(statistics.median(turn), 3) for turn in zip(*rows, strict=True)] for name, rows in ttft.items()
    }
    print("\nturn   " + "".join(f"{turn + 1:>8}" for turn in range(chat.turns)))
    for name, row in medians.items():
        print(f"{name:7}" + "".join(f"{value:8.2f}" for value in row))
    result = {
        "document_tokens": len(chat.opening()),
        "restart_before_turn": chat.turns // 2 + 1,
        "ttft_s": medians,
        "cached_tokens": cached,
    }
    print("RESULT " + json.dumps(result))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--words", type=int, default=10_000, help="of the document at most")
    parser.add_argument("--answer-tokens", type=int, default=48)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
