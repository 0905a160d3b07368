"""Tokens that come out of a cluster of vLLM engines are those of one vLLM, and the decoder computes next to none."""

import asyncio
import json

import pytest
from support.cluster import ClusterHandle
from support.vllm_questions import (
    BLOCK,
    NEW_TOKENS,
    Questions,
    computed_tokens,
    greedy,
    prompt_of,
    vllm_metric,
)
from support.vllm_reference import References

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200), pytest.mark.asyncio(loop_scope="session")]

LENGTHS = (1, 50, 127, 128, 129, 500, 2000, 4097)
PROMPTS = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
CROWD = [prompt_of(40 + 53 * i, 100 + i) for i in range(12)]
PREEMPTED = [prompt_of(4 * BLOCK - 20, 200 + i) for i in range(20)]
LONGER = 60
"""Eight of these prompts fill an engine's KV memory, and each wants one more block after a third of these tokens."""


@pytest.fixture(scope="module")
def questions(single: References) -> Questions:
    return Questions(single, [*PROMPTS, *CROWD], NEW_TOKENS)


async def preemptions(subject: ClusterHandle) -> float:
    """Of both decoders, by vLLM's own count."""
    return sum([await vllm_metric(subject, node, "vllm:num_preemptions_total") for node in ("decode-0", "decode-1")])


@pytest.mark.parametrize("prompt", PROMPTS, ids=LENGTHS)
async def test_one_prompt_of_each_length(subject: ClusterHandle, questions: Questions, prompt: list[int]) -> None:
    decoders = ("decode-0", "decode-1")
    before = {node: await computed_tokens(subject, node) for node in decoders}
    answer = await questions.ask(subject, prompt)
    computed = sum([await computed_tokens(subject, node) - before[node] for node in decoders])
    assert computed <= BLOCK, json.dumps(await subject.explain(answer.id))
    assert answer.usage["prompt_tokens"] == len(prompt)


async def test_a_chat_is_answered_alike_streamed_or_not(subject: ClusterHandle) -> None:
    messages = [{"role": "user", "content": "tell me of the quick brown fox " * 20}]
    whole = await subject.chat(messages, temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    streamed = await subject.stream_chat(messages, temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    assert streamed.text == whole["choices"][0]["message"]["content"]
    assert streamed.usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]


async def test_twelve_at_once(subject: ClusterHandle, questions: Questions) -> None:
    bodies = await asyncio.gather(*(subject.complete(prompt, **greedy()) for prompt in CROWD))
    for prompt, body in zip(CROWD, bodies, strict=True):
        questions.reference(prompt).check(body["choices"][0]["token_ids"], f"one of twelve, of {len(prompt)}")


async def test_eight_alike_at_once_are_computed_once_and_handed_over_once(
    subject: ClusterHandle, questions: Questions
) -> None:
    """Cold: the salt is nobody else's. Each decoder gets four of them."""
    nodes = ("prefill-0", "decode-0", "decode-1")
    prompt, before = PROMPTS[6], [await computed_tokens(subject, node) for node in nodes]
    bodies = await asyncio.gather(*(subject.complete(prompt, cache_salt="alike", **greedy()) for _ in range(8)))
    for body in bodies:
        questions.reference(prompt).check(body["choices"][0]["token_ids"], "one of eight alike")
    computed = [await computed_tokens(subject, node) - was for node, was in zip(nodes, before, strict=True)]
    assert computed[0] < 2 * len(prompt) and sum(computed[1:]) <= 8 * BLOCK, computed
    records = [await subject.explain(body["id"]) for body in bodies]
    # Those that wait for their turn find it all cached, and need no prefill leg.
    loaded = [sum(move["num_bytes"] for move in record["legs"][-1]["moved"]) for record in records]
    assert sum(loaded) < 4 * max(loaded), loaded


async def test_more_at_once_than_the_kv_memory_holds(subject: ClusterHandle, single: References) -> None:
    """Asked again until a decoder has so many at once: prefills come one after the other, and how those whose KV is in
    the store fall together nobody knows."""
    questions = await asyncio.to_thread(Questions, single, PREEMPTED, LONGER)
    before = await preemptions(subject)
    for _ in range(10):
        answers = await asyncio.gather(*(questions.ask(subject, prompt) for prompt in PREEMPTED))
        assert all(answer.finish_reason == "length" for answer in answers)
        if await preemptions(subject) > before:
            return
    raise AssertionError("nobody was preempted: the test shows nothing")


async def test_another_node_has_what_one_has_computed(subject: ClusterHandle, questions: Questions) -> None:
    longest = PROMPTS[-1]
    answers = [await questions.ask(subject, longest) for _ in range(2)]  # each decoder once
    for answer in answers:
        assert answer.usage["prompt_tokens_details"]["cached_tokens"] >= len(longest) - BLOCK


async def test_what_one_tenant_computed_no_other_reuses(subject: ClusterHandle) -> None:
    prompt = [7 + token % 50 for token in range(6 * BLOCK + 3)]

    async def cached(salt: str | None) -> int:
        body = await subject.complete(prompt, cache_salt=salt, **greedy())
        return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])

    first, again, others, nobodys = [await cached(salt) for salt in ("a", "a", "b", None)]
    assert first == others == nobodys == 0 and again >= len(prompt) - 2 * BLOCK


async def test_several_completions_and_their_logprobs(subject: ClusterHandle, questions: Questions) -> None:
    prompt = PROMPTS[5]
    body = await subject.complete(prompt, n=2, logprobs=2, **greedy())
    for choice in body["choices"]:
        questions.reference(prompt).check(choice["token_ids"], "one of n")
        assert len(choice["logprobs"]["token_logprobs"]) == NEW_TOKENS
        assert all(len(top) >= 1 for top in choice["logprobs"]["top_logprobs"])
