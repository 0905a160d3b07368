"""What a cluster computed is there after all of it was stopped, or its nodes killed, and started again."""

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.cluster import ClusterHandle, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NUM_PROMPTS = 12
CHUNKS = 8
PROMPTS = [random.Random(seed).choices(range(3, 250), k=64 * CHUNKS + 1) for seed in range(NUM_PROMPTS)]
GREEDY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def disk(folder: Path) -> list[str]:
    return [f"tiers.disk={{path: {folder}/disk, size: 32MiB}}"]


async def ask_all(subject: ClusterHandle) -> tuple[list[list[int]], int]:
    """The tokens of each answer, and how many prompt tokens were cached in all."""
    tokens, cached = [], 0
    for prompt in PROMPTS:
        body = await subject.complete(prompt, **GREEDY)
        tokens.append(body["choices"][0]["token_ids"])
        cached += body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens, cached


async def saved(subject: ClusterHandle, nodes: Sequence[str]) -> int:
    """Chunks on the disks of all nodes."""
    reports = [await subject.node_info(node) for node in nodes]
    return sum(tier.num_chunks or 0 for report in reports for tier in report.tiers)


async def test_a_cluster_that_was_stopped_finds_all_it_computed_on_its_disks(tmp_path: Path) -> None:
    whole = NUM_PROMPTS * CHUNKS * 64
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=disk(tmp_path)) as subject:
        first, cached = await ask_all(subject)
        assert cached == 0

        async def all_saved() -> bool:
            return await saved(subject, subject.nodes) >= NUM_PROMPTS * CHUNKS

        await subject.until(all_saved, 20)
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=disk(tmp_path)) as subject:
        second, cached = await ask_all(subject)
        assert second == first and cached == whole
        reports = [await subject.node_info(node) for node in subject.nodes]
        promoted = sum(tier.counts.get("promoted", 0) for report in reports for tier in report.tiers)
        assert promoted >= NUM_PROMPTS * CHUNKS, "warmed up, or when they were asked for"


async def test_nodes_that_were_killed_while_they_saved_believe_no_torn_chunk(tmp_path: Path) -> None:
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=disk(tmp_path)) as subject:
        first, _ = await ask_all(subject)
        for node in subject.nodes:
            os.kill(subject.launcher.pids[node], signal.SIGKILL)
        await subject.until(subject.all_ready, 60)
        second, _ = await ask_all(subject)
        third, cached = await ask_all(subject)
        assert second == third == first and cached == NUM_PROMPTS * CHUNKS * 64
