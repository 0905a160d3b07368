"""Logprobs of a prompt's tokens are those of one forward of transformers over the whole prompt."""

from pathlib import Path

import pytest
import torch
import transformers
from support.generate_reference import load_reference
from support.slow import slow_but
from support.tiny_models import KINDS, MAX_CONTEXT, VOCAB_SIZE, make_tiny_model

from engines.paged.runner import ScoreSpec
from engines.torch.engine import build_torch_engine
from engines.torch.prompt_scores import ROWS, score_prompt
from kvcore.config.fields import ByteSize
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvferry.demo.model import prepare_demo_model
from nodeapi.messages import GenerateRequest
from nodeapi.prompt_logprobs import PromptRow
from nodeapi.sampling import SamplingParams

CHUNK, TOP = 64, 4
CLOSE = 2e-4
"""Computing in other parts moves a logit by 7e-5."""


async def told_by_engine(folder: Path, prompts: list[list[int]], budget: int) -> list[list[PromptRow]]:
    config = TorchEngineConfig(block_size=16, kv_cache=ByteSize(64 << 20), max_batch_tokens=budget)
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP)
    told = []
    async with build_torch_engine(ModelConfig(path=str(folder), name="m"), config, CHUNK, lambda _: None) as engine:
        for number, prompt in enumerate([*prompts, prompts[-1]]):  # the last one's KV is cached by then
            request = GenerateRequest(request_id=str(number), prompt_token_ids=prompt, sampling=sampling, deadline_s=90)
            deltas = [delta async for delta in engine.generate(request)]
            told.append([row for delta in deltas if delta.prompt_logprobs for row in delta.prompt_logprobs.rows()])
    return told


def check_rows(reference: torch.nn.Module, prompt: list[int], told: list[PromptRow]) -> None:
    with torch.inference_mode():
        logprobs = torch.log_softmax(reference(torch.tensor([prompt])).logits[0].float(), dim=-1)
    assert [row.token_id for row in told] == prompt[1:]
    for row, true in zip(told, logprobs, strict=False):
        assert row.logprob == pytest.approx(float(true[row.token_id]), abs=CLOSE)
        ahead = int((true > true[row.token_id] + CLOSE).sum()), int((true >= true[row.token_id] - CLOSE).sum())
        assert ahead[0] < row.rank <= ahead[1]
        assert [value for _, value in row.top] == pytest.approx(true.topk(TOP).values.tolist(), abs=CLOSE)
        assert all(value == pytest.approx(float(true[token]), abs=CLOSE) for token, value in row.top)


@pytest.mark.parametrize("kind", slow_but(("llama",), KINDS))
@pytest.mark.parametrize("budget", slow_but((33,), (33, 4096)))
async def test_they_are_transformers_own_at_every_length_and_budget(kind: str, budget: int, tmp_path: Path) -> None:
    folder = make_tiny_model(kind, tmp_path)
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 2, CHUNK, CHUNK + 1, MAX_CONTEXT - 1)
    prompts = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    reference = load_reference(folder)
    for prompt, told in zip([*prompts, prompts[-1]], await told_by_engine(folder, prompts, budget), strict=True):
        check_rows(reference, prompt, told)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_the_demo_model_s_are_transformers_own() -> None:
    folder = prepare_demo_model()
    tokenizer, reference = transformers.AutoTokenizer.from_pretrained(folder), load_reference(folder)
    text = "The capital of France is Paris. The quick brown fox jumps over the lazy dog. " * 8
    prompt = tokenizer(text).input_ids
    for told in await told_by_engine(folder, [prompt], 64):
        check_rows(reference, prompt, told)


def test_no_more_than_a_few_rows_of_logits_are_there_at_a_time() -> None:
    sizes: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden @ torch.eye(8)

    hidden = torch.randn(5 * ROWS + 3, 8)
    told = score_prompt(hidden, head, ScoreSpec(0, [3] * len(hidden), 2), 1)
    assert told is not None and len(told) == len(hidden) and told.start == 1
    assert sum(sizes) == len(hidden) and max(sizes) == ROWS


def test_logits_that_are_no_numbers_are_told_as_none() -> None:
    hidden = torch.randn(ROWS + 3, 8)
    hidden[-1, 0] = float("nan")
    assert score_prompt(hidden, lambda rows: rows, ScoreSpec(0, [3] * len(hidden), 2), 1) is None
