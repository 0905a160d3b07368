"""A prompt that a client asks to have kept outlives a flood of others, where the cluster file allows it."""

import random
from pathlib import Path

import pytest
from support.cluster import ClusterHandle, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CHUNKS = 8
GREEDY = {"max_tokens": 2, "temperature": 0, "ignore_eos": True}


def prompt(seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 250), k=64 * CHUNKS + 1)


async def cached(subject: ClusterHandle, seed: int, **hints: str) -> int:
    body = await subject.complete(prompt(seed), **GREEDY, **hints)
    if hints:

        async def said() -> bool:
            (hint,) = (await subject.explain(body["id"]))["hints"]
            return bool(hint["why"])

        await subject.until(said, 60)
    tokens: int = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_prompt_that_shall_be_kept_outlives_a_flood_where_hints_count(tmp_path: Path, allowed: bool) -> None:
    """Both segments hold 60 chunks each or so; the engines' own caches, 4 prompts. 40 prompts of 8 chunks pass by."""
    overrides = [
        f"router.cache={{hints: {str(allowed).lower()}}}",
        "engine.num_blocks=160",
        "nodes.prefill-0.segment=512KiB",
        "nodes.decode-0.segment=512KiB",
    ]
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=overrides) as subject:
        assert await cached(subject, 0, prompt_cache_retention="24h") == 0
        for seed in range(1, 41):
            await cached(subject, seed)
        assert await cached(subject, 0) == (64 * CHUNKS if allowed else 0)
