"""What a cluster computed is there after all of it was stopped, or its nodes killed, and started again."""

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.cluster import ClusterHandle, cluster
from support.redis_server import redis_server, with_redis
from support.restarts import finds_all_after_a_restart
from support.s3_server import s3_server, with_s3
from support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NUM_PROMPTS = 12
CHUNKS = 8
PROMPTS = [random.Random(seed).choices(range(3, 250), k=64 * CHUNKS + 1) for seed in range(NUM_PROMPTS)]
GREEDY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def disk(folder: Path) -> list[str]:
    return [f"tiers.disk={{path: {folder}/disk, size: 32MiB}}"]


async def ask_all(subject: ClusterHandle, prompts: Sequence[list[int]] = PROMPTS) -> tuple[list[list[int]], int]:
    """The tokens of each answer, and how many prompt tokens were cached in all."""
    tokens, cached = [], 0
    for prompt in prompts:
        body = await subject.complete(prompt, **GREEDY)
        tokens.append(body["choices"][0]["token_ids"])
        cached += body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens, cached


async def saved(subject: ClusterHandle, nodes: Sequence[str]) -> int:
    """Chunks on the disks of all nodes."""
    reports = [await subject.node_info(node) for node in nodes]
    return sum(tier.num_chunks or 0 for report in reports for tier in report.tiers)


async def test_a_cluster_that_was_stopped_finds_all_it_computed_on_its_disks(tmp_path: Path) -> None:
    await finds_all_after_a_restart(tmp_path, "disk", disk(tmp_path))


@with_redis
async def test_a_cluster_that_was_stopped_finds_all_it_computed_in_its_redis(tmp_path: Path) -> None:
    with redis_server() as server:
        await finds_all_after_a_restart(tmp_path, "redis", [f"tiers.redis={{url: '{server.url}'}}"])


async def test_nodes_that_were_killed_while_they_saved_believe_no_torn_chunk(tmp_path: Path) -> None:
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=disk(tmp_path)) as subject:
        first, _ = await ask_all(subject)
        killed = {node: subject.launcher.pids[node] for node in subject.nodes}
        for pid in killed.values():
            os.kill(pid, signal.SIGKILL)

        async def started_again() -> bool:
            reports = [await subject.node_info(node) for node in killed]
            anew = all(subject.launcher.pids.get(node) not in {None, pid} for node, pid in killed.items())
            return anew and all(report.engine for report in reports) and await subject.all_ready()

        await subject.until(started_again, 60)
        second, _ = await ask_all(subject)
        third, cached = await ask_all(subject)
        assert second == third == first and cached == NUM_PROMPTS * CHUNKS * 64


@with_redis
@pytest.mark.timeout(240)
async def test_clusters_that_share_a_redis_find_what_either_computed_and_answer_without_it(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    with redis_server() as server:
        redis = [f"tiers.redis={{url: '{server.url}'}}"]
        async with cluster(one, prefillers=1, decoders=1, overrides=redis) as subject:
            first, cached = await ask_all(subject)
            assert cached == 0

            async def all_saved() -> bool:
                keys = server.ask(b"KEYS", b"kvf1:{*")
                return isinstance(keys, list) and len(keys) >= NUM_PROMPTS * CHUNKS

            await subject.until(all_saved, 60)
        worth_it = [*redis, "engine.prefill_tokens_per_s=1000", "tiers.wait_s=60"]  # to load, on any machine
        async with cluster(two, prefillers=1, decoders=1, overrides=worth_it) as subject:
            half = NUM_PROMPTS // 2
            with_it, cached = await ask_all(subject, PROMPTS[:half])
            assert cached == half * CHUNKS * 64, "all chunks that the other cluster computed"
            assert (await subject.cache_stats()).start.by_source == {"redis": cached}
            server.stop()
            without, _ = await ask_all(subject, PROMPTS[half:])
            assert with_it + without == first

            async def said() -> bool:
                reports = [await subject.node_info(node) for node in subject.nodes]
                return any(server.url in tier.problem for report in reports for tier in report.tiers)

            await subject.until(said, 60)


@with_s3
@pytest.mark.timeout(240)
async def test_a_cluster_that_was_stopped_finds_all_it_computed_in_its_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as server:
        for name, value in server.credentials.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{server.make_bucket()}/kv"
        objects = [f"tiers.object={{url: '{url}', endpoint: '{server.url}'}}"]
        await finds_all_after_a_restart(tmp_path, "object", objects)
    logs = list((tmp_path / "logs").iterdir())
    assert logs and not any(server.credentials["AWS_SECRET_ACCESS_KEY"] in log.read_text() for log in logs)


async def test_kv_that_went_through_int8_is_found_again_and_is_no_kv_of_an_exact_cluster(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model")
    prompts = [prompt[: 64 * 6 + 1] for prompt in PROMPTS[:4]]
    fingerprints, cached_tokens = [], []
    for number, codec in enumerate(["int8", "int8", "none"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        tiers = [f"tiers.disk={{path: {tmp_path}/disk, size: 32MiB, codec: {codec}}}", "tiers.wait_s=60"]
        async with cluster(folder, engine="torch", model=model, prefillers=0, decoders=1, overrides=tiers) as subject:
            _, cached = await ask_all(subject, prompts)
            cached_tokens.append(cached)

            async def all_saved(subject: ClusterHandle = subject) -> bool:
                return await saved(subject, subject.nodes) >= 6 * len(prompts)

            await subject.until(all_saved, 60)
            report = await subject.node_info("decode-0")
            fingerprints.append(report.node.fingerprint)
            assert not any(tier.counts.get("damaged", 0) for tier in report.tiers)
    assert cached_tokens == [0, 6 * 64 * len(prompts), 0]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
