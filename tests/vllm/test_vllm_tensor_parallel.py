"""Two ranks an engine: each stores its own part of every chunk, and a chunk is there when both parts are."""

import asyncio

import pytest
from support.cluster import cluster
from support.vllm_questions import BLOCK, NEW_TOKENS, Questions, computed_tokens, prompt_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

PROMPTS = [prompt_of(length, 500 + length) for length in (60, 300, 1000)]


async def test_tokens_are_those_of_one_vllm_and_each_rank_moves_its_part(tiny, single, tmp_path):
    questions = await asyncio.to_thread(Questions, single, PROMPTS, NEW_TOKENS)
    overrides = [
        "router.min_prefill_tokens=0",
        "router.decoder_prefill=needed",
        "engine.args.tensor-parallel-size=2",
        *(f"nodes.{node}.engine.env.VLLM_CPU_OMP_THREADS_BIND=0|1" for node in ("prefill-0", "decode-0")),
        *(f"nodes.{node}.segment=32MiB" for node in ("prefill-0", "decode-0")),
    ]
    async with cluster(tmp_path, engine="vllm", model=tiny, prefillers=1, decoders=1, overrides=overrides) as handle:
        for prompt in PROMPTS:
            before = await computed_tokens(handle, "decode-0")
            answer = await questions.ask(handle, prompt)
            assert await computed_tokens(handle, "decode-0") - before <= BLOCK, await handle.explain(answer.id)
        report = await handle.node_info("decode-0")
        assert report.engine is not None and report.engine.kv_spec.tp_size == 2
        legs = (await handle.explain(answer.id))["legs"]
        got = sum(moved["num_bytes"] for leg in legs if leg["kind"] == "decode" for moved in leg["moved"])
        assert got >= 2 * (len(PROMPTS[-1]) // BLOCK) * report.engine.kv_spec.chunk_bytes, "both ranks' parts"
