"""Clusters with a Mooncake tier: what they computed outlives them with whoever lent the memory; its master may die."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
from support.cluster import ClusterHandle, cluster
from support.mooncake_server import MooncakeServer, mooncake_server, needs_mooncake
from support.restarts import counted, finds_all_after_a_restart

pytestmark = [*needs_mooncake, pytest.mark.timeout(240)]

CHUNKS = 8
PROMPTS = [random.Random(f"mooncake {seed}").choices(range(3, 250), k=64 * CHUNKS + 1) for seed in range(12)]
LATER = [random.Random(f"later {seed}").choices(range(3, 250), k=64 * CHUNKS + 1) for seed in range(200)]
GREEDY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture
def server() -> Iterator[MooncakeServer]:
    """This test's processes, the cluster's too, are where it is."""
    with mooncake_server() as server, server.machines.entered():
        yield server


def section(server: MooncakeServer) -> list[str]:
    return [f"tiers.mooncake={{master: '{server.master}'}}"]


async def ask(subject: ClusterHandle, prompt: list[int]) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were cached."""
    body = await subject.complete(prompt, **GREEDY)
    return body["choices"][0]["token_ids"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_a_cluster_that_was_stopped_finds_all_it_computed_with_whoever_lent_the_memory(
    tmp_path: Path, server: MooncakeServer
) -> None:
    lending = ["tiers.mooncake.global_segment_size=64MiB"]  # the second cluster's nodes lend some, too
    await finds_all_after_a_restart(tmp_path, "mooncake", section(server), later=lending)


async def test_the_master_is_killed_and_back_and_every_request_answered(tmp_path: Path, server: MooncakeServer) -> None:
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=section(server)) as subject:
        first = [await ask(subject, prompt) for prompt in PROMPTS]
        server.stop()
        began = monotonic()
        assert [await ask(subject, prompt) for prompt in PROMPTS] == [(tokens, CHUNKS * 64) for tokens, _ in first]
        without = [await ask(subject, prompt) for prompt in LATER[:6]]
        assert [cached for _, cached in without] == [0] * 6 and monotonic() - began < 60

        async def said() -> bool:
            reports = [await subject.node_info(node) for node in subject.nodes]
            return any(server.master in tier.problem for report in reports for tier in report.tiers)

        await subject.until(said, 60)
        server.start()
        before, end = await counted(subject, "saved"), monotonic() + 60
        for prompt in LATER[6:]:
            await ask(subject, prompt)
            if await counted(subject, "saved") > before or monotonic() > end:
                break
            await asyncio.sleep(0.3)
        assert await counted(subject, "saved") > before, "after 5 s on a machine that has nothing else to do"
