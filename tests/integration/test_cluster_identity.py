"""Tokens that come out of a whole cluster (router, prefiller, store, decoder as processes) are those of `generate`.

And what the cache promises: right `cached_tokens`, only the rest computed, a first token at least three times sooner.
"""

import asyncio

import pytest
import transformers
from support.cluster import ClusterHandle, cluster
from support.generate_reference import PROMPTS, assert_identical, load_reference
from support.tiny_models import MAX_CONTEXT, VOCAB_SIZE, make_tiny_model

from kvferry.demo.document import document
from kvferry.demo.model import prepare_demo_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CHUNK = 64
NEW_TOKENS = 16
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, MAX_CONTEXT - NEW_TOKENS)
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
ONE_OF_EACH = {"prefillers": 1, "decoders": 1}


def prompt_of(length: int, seed: int) -> list[int]:
    """Token ids that look random, none of them special, the same on every run."""
    return [3 + (seed * 7919 + i * i * 31 + i * 17) % (VOCAB_SIZE - 3) for i in range(length)]


async def moved_by(handle: ClusterHandle, request_id: str) -> dict[str, int]:
    """Transport -> bytes, over both legs."""
    totals: dict[str, int] = {}
    for leg in (await handle.explain(request_id))["legs"]:
        for moved in leg["moved"]:
            totals[moved["transport"]] = totals.get(moved["transport"], 0) + moved["num_bytes"]
    return totals


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
async def test_a_cluster_answers_as_generate_does(kind, transport, tmp_path):
    folder = make_tiny_model(kind, tmp_path / kind)
    reference = load_reference(folder)
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    crowd = [prompt_of(40 + 23 * i, 100 + i) for i in range(16)]
    moves = ["router.decoder_prefill=needed"]  # whatever is faster on this machine
    async with cluster(
        tmp_path, engine="torch", model=folder, transport=transport, overrides=moves, **ONE_OF_EACH
    ) as handle:
        answers = [await handle.stream(prompt, **GREEDY) for prompt in prompts]
        together = await asyncio.gather(*[handle.complete(prompt, **GREEDY) for prompt in crowd])
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_identical(reference, prompt, answer.token_ids)
            assert answer.usage["prompt_tokens"] == len(prompt)
        for prompt, body in zip(crowd, together, strict=True):
            assert_identical(reference, prompt, body["choices"][0]["token_ids"])
        longest = await moved_by(handle, answers[-1].id)
        assert set(longest) == {transport}, "bytes went by the transport that was asked for and no other"
        info = await handle.node_info("decode-0")
        assert info.engine.kv_spec.chunk_bytes * 2 * ((LENGTHS[-1] - 1) // CHUNK) <= longest[transport]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_the_demo_model_answers_ten_prompts_as_generate_does(transport, tmp_path):
    folder = prepare_demo_model()
    reference, tokenizer = load_reference(folder), transformers.AutoTokenizer.from_pretrained(folder)
    async with cluster(
        tmp_path,
        engine="torch",
        model=folder,
        transport=transport,
        overrides=["engine.block_size=64", "engine.kv_cache=256MiB", "nodes.decode-0.segment=128MiB"],
        **ONE_OF_EACH,
    ) as handle:
        # in twos: one thread a worker, and a batch is what production does
        prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        answers = []
        for pair in zip(PROMPTS[::2], PROMPTS[1::2], strict=True):
            answers += await asyncio.gather(*[handle.stream(prompt, **GREEDY) for prompt in pair])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.usage["prompt_tokens"] == len(prompt), "the router tokenizes as transformers does"
        assert_identical(reference, prompt, answer.token_ids)


async def test_a_shared_prefix_is_computed_once_in_the_whole_cluster(tmp_path):
    """Two prefillers, two decoders, round robin: the second request meets neither node of the first."""
    folder = prepare_demo_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prefix = tokenizer(document()).input_ids[:1000]
    questions = ("Who keeps the book?", "How wide is the river, and why?", "When does the mill stop?", "Who rows?")
    tails = [tokenizer(f"\n\n{question}").input_ids for question in questions]
    async with cluster(
        tmp_path,
        engine="torch",
        model=folder,
        overrides=[
            "engine.block_size=64",
            "engine.kv_cache=256MiB",
            "router.policy=round_robin",
            "router.min_prefill_tokens=0",
            "router.decoder_prefill=needed",
            *[f"nodes.{node}.segment=128MiB" for node in ("prefill-0", "prefill-1", "decode-0", "decode-1")],
        ],
    ) as handle:
        for node in ("warm-up 0", "warm-up 1"):  # a first step of torch is slow on each node: not what is compared
            await handle.stream(tokenizer(node * 40).input_ids, **GREEDY)
        first, second, *later = answers = [await handle.stream(prefix + tail, **GREEDY) for tail in tails]
        routes = [(await handle.explain(answer.id))["route"] for answer in (first, second)]
        legs = (await handle.explain(second.id))["legs"]
        reference = load_reference(folder)
        for tail, answer in zip(tails, answers, strict=True):
            assert_identical(reference, prefix + tail, answer.token_ids)
    assert routes[0]["prefiller"] != routes[1]["prefiller"]
    assert routes[0]["decoder"] != routes[1]["decoder"]
    cached = 1000 // CHUNK * CHUNK
    assert first.usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert second.usage["prompt_tokens_details"]["cached_tokens"] == cached
    rest = 1000 + len(tails[1]) - cached
    assert sum(leg["computed_tokens"] for leg in legs) <= rest, legs
    reused_s = min(answer.first_token_s for answer in (second, *later))  # what else runs here only adds to one of them
    print(f"TTFT {first.first_token_s:.3f} s, then {reused_s:.3f} s")
    assert first.first_token_s >= 3 * reused_s
