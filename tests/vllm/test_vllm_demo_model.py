"""The demo model over a prefiller and a decoder of vLLM: tokens of one vLLM, as clients ask for them."""

import asyncio
from contextlib import closing

import pytest
from support.cluster import cluster
from support.vllm_questions import BLOCK, NEW_TOKENS, Questions, computed_tokens
from support.vllm_reference import References

from kvferry.demo.document import document
from kvferry.demo.model import prepare_demo_model
from router.text.tokenizer import FolderTokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

LENGTHS = (1, 50, 127, 128, 129, 500, 2000, 4097)
CONTEXT = 4352


async def test_tokens_at_every_length_are_those_of_one_vllm(tmp_path):
    folder = prepare_demo_model()
    words = FolderTokenizer(folder).encode(document())
    prompts = [[seed + 100, *words, *words, *words][:length] for seed, length in enumerate(LENGTHS)]
    overrides = [
        "router.min_prefill_tokens=0",
        "router.decoder_prefill=needed",
        f"model.max_context={CONTEXT}",
        "engine.args.kv-cache-memory-bytes=260M",
        "nodes.decode-0.segment=512MiB",
    ]
    with closing(References("demo", folder, max_model_len=CONTEXT)) as single:
        computing = asyncio.create_task(asyncio.to_thread(Questions, single, prompts, NEW_TOKENS))
        async with cluster(
            tmp_path, engine="vllm", model=folder, prefillers=1, decoders=1, overrides=overrides
        ) as handle:
            questions = await computing
            for prompt in prompts:
                before = await computed_tokens(handle, "decode-0")
                answer = await questions.ask(handle, prompt)
                assert await computed_tokens(handle, "decode-0") - before <= BLOCK, await handle.explain(answer.id)
                assert answer.usage["prompt_tokens"] == len(prompt)
