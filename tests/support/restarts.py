"""A cluster that computes fifty prompts, is stopped, and is started again over the same tier: what it must find."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
from support.cluster import ClusterHandle, cluster

from engines.sim.reference import expected_tokens
from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.config.schema import SimEngineConfig
from nodeapi.sampling import SamplingParams
from nodeapi.upkeep import ChunksReply, ChunksRequest

CHUNK_TOKENS = 64
CHUNKS = 8
"""Full ones of each prompt."""
WHOLE = CHUNKS * CHUNK_TOKENS
FIFTY = [random.Random(f"fifty {seed}").choices(range(3, 250), k=WHOLE + 1) for seed in range(50)]
AT_ONCE = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
SLOW = ("engine.prefill_tokens_per_s=20", "tiers.wait_s=60")
"""Of the second start: where a prompt takes 26 s to compute, a tier is worth waiting for on whatever machine. With an
engine that needs 26 ms for it, and objects that take 3 ms for each chunk, computing is the right choice."""


async def ask(subject: ClusterHandle, prompt: list[int]) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were cached."""
    body = await subject.complete(prompt, max_tokens=4, temperature=0, ignore_eos=True, return_token_ids=True)
    return body["choices"][0]["token_ids"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


async def ask_fifty(subject: ClusterHandle, at_once: int = AT_ONCE) -> list[int]:
    """How many tokens of each prompt were cached for an answer that is what computing gives."""
    engine = subject.config.engine
    assert isinstance(engine, SimEngineConfig)
    answers = list[tuple[list[int], int]]()
    for at in range(0, len(FIFTY), at_once):
        answers += await asyncio.gather(*(ask(subject, prompt) for prompt in FIFTY[at : at + at_once]))
    assert [tokens for tokens, _ in answers] == [expected_tokens(engine, prompt, GREEDY)[0] for prompt in FIFTY]
    return [cached for _, cached in answers]


async def counted(subject: ClusterHandle, *whats: str) -> int:
    """Chunks, by what the nodes did with them."""
    reports = [await subject.node_info(node) for node in subject.nodes]
    return sum(tier.counts.get(what, 0) for report in reports for tier in report.tiers for what in whats)


async def until_saved(subject: ClusterHandle, tier: str) -> None:
    """Until each chunk of each prompt is in the tier, by its own account."""
    prefill = (await subject.node_info("prefill-0")).node
    root = root_key(prefill.fingerprint, b"")
    keys = [bytes(key) for prompt in FIFTY for key in chunk_keys(root, prompt, CHUNK_TOKENS)]
    order = ChunksRequest(action="find", fingerprint=prefill.fingerprint, keys=keys, tiers=[tier], deadline_s=60.0)

    async def all_told() -> bool:
        return await counted(subject, "saved", "there") >= len(keys)

    async def all_there() -> bool:
        found = [False] * len(keys)
        for node in subject.nodes:
            url = f"{subject.node_url(node)}/v1/upkeep/chunks"
            async with subject.session.post(url, data=msgspec.msgpack.encode(order)) as reply:
                assert reply.status == 200, await reply.read()
                (place,) = msgspec.msgpack.decode(await reply.read(), type=ChunksReply).places
            found = [one or other for one, other in zip(found, place.found, strict=True)]
        return all(found)

    await subject.until(all_told, 60)
    await subject.until(all_there, 60)


async def finds_all_after_a_restart(
    folder: Path, tier: str, overrides: Sequence[str], *, later: Sequence[str] = ()
) -> None:
    """`later`: of the second start alone."""
    async with cluster(folder, prefillers=1, decoders=1, overrides=overrides) as subject:
        assert await ask_fifty(subject) == [0] * len(FIFTY)
        await until_saved(subject, tier)
    async with cluster(folder, prefillers=1, decoders=1, overrides=[*overrides, *SLOW, *later]) as subject:
        await ask(subject, [1] * (CHUNK_TOKENS + 1))  # new: the prefiller knows now how slow its engine is
        assert await ask_fifty(subject, at_once=2) == [WHOLE] * len(FIFTY)
        assert await counted(subject, "promoted") >= len(FIFTY) * CHUNKS, "warmed up, or when they were asked for"
