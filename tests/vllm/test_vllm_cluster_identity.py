"""Tokens that come out of a cluster of vLLM engines are those of one vLLM, and the decoder computes next to none."""

import asyncio

import pytest
from support.cluster import ClusterHandle, cluster
from support.tiny_models import VOCAB_SIZE, make_tiny_model
from support.vllm_reference import vllm_reference

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BLOCK = 128
NEW_TOKENS = 8
LENGTHS = (1, 50, 127, 128, 129, 500, 2000, 4097)
CONTEXT = 4224
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
COMPUTED = 'vllm:prompt_tokens_by_source_total{engine="0",model_name="%s",node="%s",source="local_compute"}'


def prompt_of(length: int, seed: int) -> list[int]:
    """Token ids that look random, none of them special, the same on every run."""
    return [3 + (seed * 7919 + i * i * 31 + i * 17) % (VOCAB_SIZE - 3) for i in range(length)]


async def computed_by(handle: ClusterHandle, node: str) -> float:
    """Prompt tokens that vLLM itself says it computed."""
    metrics = await handle.metrics(handle.node_url(node))
    return sum(
        value
        for name, value in metrics.items()
        if name.startswith("vllm:prompt_tokens_by_source_total") and 'source="local_compute"' in name
    )


async def test_a_vllm_cluster_answers_as_one_vllm_does(tmp_path):
    """Every length alone, streamed; then twelve at once; then as chat; then what is cached from another node."""
    folder = make_tiny_model("qwen3", tmp_path / "qwen3", max_context=CONTEXT, head_dim=64)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    crowd = [prompt_of(40 + 53 * i, 100 + i) for i in range(12)]
    references = vllm_reference(folder, [*prompts, *crowd], NEW_TOKENS, max_model_len=CONTEXT)
    overrides = ["nodes.decode-0.segment=64MiB", "router.min_prefill_tokens=0"]
    async with cluster(tmp_path, engine="vllm", model=folder, prefillers=1, decoders=1, overrides=overrides) as handle:
        for prompt, reference in zip(prompts, references, strict=False):
            before = await computed_by(handle, "decode-0")
            answer = await handle.stream(prompt, **GREEDY)
            reference.check(answer.token_ids, f"prompt of {len(prompt)}")
            assert await computed_by(handle, "decode-0") - before <= BLOCK, await handle.explain(answer.id)
            assert answer.usage["prompt_tokens"] == len(prompt)
        bodies = await asyncio.gather(*(handle.complete(prompt, **GREEDY) for prompt in crowd))
        for prompt, body, reference in zip(crowd, bodies, references[len(prompts) :], strict=True):
            reference.check(body["choices"][0]["token_ids"], f"one of twelve, of {len(prompt)}")
        again = await handle.stream(prompts[-1], **GREEDY)
        references[len(prompts) - 1].check(again.token_ids, "the longest once more")
        assert again.usage["prompt_tokens_details"]["cached_tokens"] >= 4096 - BLOCK
        assert_quiet(await handle.node_info("prefill-0"))
        assert_quiet(await handle.node_info("decode-0"))


def assert_quiet(report):
    assert report.stats is not None
    assert (report.stats.running, report.stats.waiting, report.stats.loading, report.stats.pending_saves) == (0,) * 4
