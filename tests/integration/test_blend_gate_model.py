"""The gate over a real model: on while documents are reused as they should be, off once something of it is wrong."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
from tokenizers import Tokenizer

from engines.base import Engine
from engines.torch.engine import build_torch_engine
from engines.torch.row_moves import RowMover
from kvcore.config.kv.settings import BlendConfig
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvferry.blend.check import CheckedSetting, gate_limits
from kvferry.demo.document import document
from kvferry.demo.model import prepare_demo_model
from nodeapi.documents import CompareReply, CompareRequest, Documents
from router.shadow.gate import BlendGate
from router.shadow.limits import BlendGateLimits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HEADER = "You are a careful assistant. Answer the question about the documents in a few words.\n"
BOUND = BlendGateLimits().judged_from


class Prompts:
    """Two passages behind a header, each with a code at its end, and the question for that of the later one."""

    def __init__(self, folder: str) -> None:
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self._encode = lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
        self._passages = [one for one in re.split(r"\n\s*\n", document()) if len(one) > 300]

    def one(self, number: int) -> CompareRequest:
        passages = self._passages
        header, texts = self._encode(HEADER), list[list[int]]()
        for at, door in enumerate(("north", "south")):
            passage, code = passages[(2 * number + at) % len(passages)], 1000 + (7919 * (2 * number + at)) % 9000
            texts.append(self._encode(f"\n{passage}\nThe code of the {door} door is {code}.\n"))
        tail = self._encode("\nQuestion: What is the code of the south door?\nAnswer: The code of the south door is")
        spans, prompt = list[tuple[int, int]](), list(header)
        for text in texts:
            spans.append((len(prompt), len(prompt) + len(text)))
            prompt += text
        said = Documents(header=len(header), spans=spans, k=8)
        return CompareRequest(
            request_id=f"c{number}", prompt_token_ids=prompt + tail, documents=said, num_tokens=6, deadline_s=300
        )


@pytest.fixture(scope="module")
def folder() -> str:
    return str(prepare_demo_model())


@asynccontextmanager
async def engine_of(folder: str) -> AsyncIterator[Engine]:
    config = TorchEngineConfig(block_size=16)
    async with build_torch_engine(ModelConfig(path=folder, name="m"), config, 64, lambda _: None) as engine:
        yield engine


async def compared(folder: str, most: int = BOUND) -> list[CompareReply]:
    prompts, replies = Prompts(folder), []
    async with engine_of(folder) as engine:
        for number in range(most):
            reply = await engine.compare(prompts.one(number))
            assert reply.approximate_tokens > 0, "else nothing was compared"
            replies.append(reply)
    return replies


@pytest.fixture(scope="module")
def limits(folder: str) -> BlendConfig:
    """Those that `kvferry blend check` prints, of half of the prompts; the other half is within them."""
    replies = asyncio.run(compared(folder))
    half = BOUND // 2
    max_kl, min_agreement = gate_limits(
        CheckedSetting(
            k=8,
            questions=half,
            kl=fmean(one.kl[0] for one in replies[:half]),
            agreement=fmean(one.agreement for one in replies[:half]),
            full_s=1.0,
            reused_s=1.0,
            holds=True,
        )
    )
    config = BlendConfig(mode="first_k", max_kl=max_kl, min_agreement=min_agreement)
    assert not judged(config, replies[half:] * 2), [(one.kl[0], one.agreement) for one in replies]
    return config


def judged(config: BlendConfig, replies: list[CompareReply]) -> str:
    """Why it was turned off; empty: it was not."""
    gate = BlendGate(config, lambda: 0.0)
    for reply in replies:
        gate.compared("m", "field", reply.kl[0], reply.agreement)
    return gate.why_off("m", "field")


def turned_the_wrong_way(patch: pytest.MonkeyPatch) -> None:
    right = RowMover._turned
    patch.setattr(RowMover, "_turned", lambda self, keys, distance: right(self, keys, -distance))


def of_other_rows(patch: pytest.MonkeyPatch) -> None:
    right = RowMover._move

    def wrong(self: RowMover, move: Any, first: int, count: int) -> None:
        size = min(32, max(0, move.count - 1))
        return right(self, replace(move, source_row=max(0, move.source_row - size)), first, count)

    patch.setattr(RowMover, "_move", wrong)


def of_another_document(patch: pytest.MonkeyPatch) -> None:
    """Rows of the blocks that are another document's."""
    right, seen = RowMover.run, list[Any]()

    def wrong(self: RowMover, moves: Any, fresh: Any) -> None:
        other = list(seen)
        seen.extend(move for move in moves if move.position != move.computed_at)
        swapped = [
            replace(move, source=other[0].source, source_row=0, count=min(move.count, other[0].count))
            if other and move.position != move.computed_at
            else move
            for move in moves
        ]
        return right(self, swapped, fresh)

    patch.setattr(RowMover, "run", wrong)


@pytest.mark.parametrize("fault", [turned_the_wrong_way, of_other_rows, of_another_document])
async def test_what_is_wrong_turns_it_off_within_its_bound(folder, limits, monkeypatch, fault):
    fault(monkeypatch)
    replies = await compared(folder)
    assert judged(limits, replies), [(limits, reply.kl[0], reply.agreement) for reply in replies]
