"""Logprobs that a cluster of vLLM engines tells: of a prompt those of one forward of the model, in vLLM's form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.cluster import ClusterHandle
from support.generate_reference import load_reference
from support.vllm_questions import BLOCK, greedy, lookup, prompt_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="session")]

PROMPTS = [prompt_of(length, 900 + length) for length in (2, 129, 1000)]
CLOSE = 2e-3
Rows = list[dict[str, dict[str, Any]] | None]


@pytest.fixture(scope="module")
def model(tiny: Path) -> torch.nn.Module:
    return load_reference(tiny)


def logprobs_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """[number of tokens, vocabulary]: of what follows each."""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), dim=-1)


def check(rows: Rows, prompt: list[int], true: torch.Tensor, top: int) -> None:
    assert rows[0] is None and len(rows) == len(prompt)
    for token, row, own in zip(prompt[1:], rows[1:], true, strict=False):
        assert row is not None and next(iter(row)) == str(token) and top <= len(row) <= top + 1
        assert set(row[str(token)]) == {"logprob", "rank", "decoded_token"}
        for name, told in row.items():
            assert told["logprob"] == pytest.approx(float(own[int(name)]), abs=CLOSE)
        assert sorted(told["rank"] for told in row.values())[:top] == list(range(1, top + 1))


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
async def test_prompt_logprobs_are_those_of_a_forward_whatever_is_cached(
    subject: ClusterHandle, model: torch.nn.Module, prompt: list[int]
) -> None:
    plain, true = await subject.complete(prompt, **greedy()), logprobs_of(model, prompt)
    for _ in range(2):  # each decoder once
        body = await subject.complete(prompt, prompt_logprobs=3, **greedy())
        check(body["choices"][0]["prompt_logprobs"], prompt, true, 3)
        assert body["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_what_was_computed_for_them_is_stored_for_others(subject: ClusterHandle) -> None:
    prompt = prompt_of(6 * BLOCK + 3, 950)
    await subject.complete(prompt, prompt_logprobs=0, **greedy(1))

    async def stored() -> bool:  # beside the answer, not before it
        return len((await lookup(subject, prompt)).replicas) == len(prompt) // BLOCK

    await subject.until(stored, 60)
    for _ in range(2):
        body = await subject.complete(prompt, **greedy(1))
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(prompt) - 2 * BLOCK


async def test_an_echo_alone_and_listed_tokens(subject: ClusterHandle, model: torch.nn.Module) -> None:
    prompt, listed = PROMPTS[1], [7, 300, 9]
    true = logprobs_of(model, prompt)
    (echoed,) = (await subject.complete(prompt, echo=True, logprobs=1, max_tokens=0))["choices"]
    own = [float(true[at, token]) for at, token in enumerate(prompt[1:])]
    assert echoed["logprobs"]["token_logprobs"] == [None, *(pytest.approx(value, abs=CLOSE) for value in own)]
    asked = {"logprobs": 0, "logprob_token_ids": listed, "return_tokens_as_token_ids": True}
    (choice,) = (await subject.complete(prompt, **asked, **greedy(1)))["choices"]
    (top,) = choice["logprobs"]["top_logprobs"]
    for token in listed:
        assert top[f"token_id:{token}"] == pytest.approx(float(true[-1, token]), abs=CLOSE)
