"""`kvferry cache` and what stands behind it, on whole clusters: each command of its page, and generations of KV."""

import asyncio
import json
import os
import random
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cluster import ClusterHandle, cluster
from support.redis_server import redis_server, with_redis

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.compile(r"<!-- runs: cache -->\n```bash\n(.*?)```", re.S)
CHUNK = 64
PROMPTS = [random.Random(seed).choices(range(3, 250), k=CHUNK * 8 + 1) for seed in range(4)]
GREEDY = {"max_tokens": 2, "temperature": 0, "ignore_eos": True}


async def kvferry(subject: ClusterHandle, folder: Path, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `kvferry cache ...` about this cluster."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvferry", "cache", *words, "--url", subject.url,
        cwd=folder, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def told(subject: ClusterHandle, folder: Path, *words: str) -> Any:
    code, out, err = await kvferry(subject, folder, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def disk(folder: Path, size: str = "32MiB") -> list[str]:
    return [f"tiers.disk={{path: {folder}/disk, size: {size}}}"]


def used(line: dict[str, Any]) -> dict[str, int]:
    """Chunks by place, over all nodes."""
    places: dict[str, int] = {}
    for place in line["places"]:
        places[place["place"]] = places.get(place["place"], 0) + place["chunks"]
    return places


async def in_tiers(subject: ClusterHandle, folder: Path, least: int) -> list[dict[str, Any]]:
    """The generations, once the live one has so many chunks in each tier."""

    async def there() -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = (await told(subject, folder, "ls"))["generations"]
        live = used(lines[0])
        return lines if all(live.get(tier, 0) >= least for tier in ("disk", "redis")) else []

    return await subject.until(there, 60)


async def test_each_command_of_the_page_does_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("A ferry is a boat that carries people. " * 40)
    bodies = [{"prompt": prompt} for prompt in PROMPTS[:2]]
    (tmp_path / "requests.jsonl").write_text("\n".join(json.dumps(body) for body in bodies))
    page = (ROOT / "docs" / "cache.md").read_text()
    lines = [line for block in BLOCKS.findall(page) for line in block.splitlines()]
    assert len(lines) == 13
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=disk(tmp_path)) as subject:
        said = {}
        for line in lines:
            words = [word for word in shlex.split(line)[2:] if word not in ("--config", "tiers.yaml")]
            code, out, err = await kvferry(subject, tmp_path, *words)
            assert (code, err) == (0, ""), line
            said[" ".join(words)] = out
    assert "live" in said["ls"] and "disk" in said["stat"]
    lookup = said["lookup prompt.txt"].splitlines()[1].split()
    assert lookup[0] == "prompt.txt" and lookup[2:4] == ["0", "0"] and lookup[1] == lookup[4]
    warmed = said["warm prompt.txt requests.jsonl"].splitlines()
    assert re.match(r"prompts: 3, \d+ tokens computed", warmed[-1]) and len(warmed) == 4
    assert said["prefetch prompt.txt"].startswith("prompts: 1, full chunks: ")
    assert re.search(r"memory: \d+ chunks pinned", said["pin prompt.txt"])
    assert re.search(r"disk of \S+: [1-9]\d* chunks pinned", said["pin prompt.txt"])
    assert re.search(r"disk of \S+: [1-9]\d* chunks unpinned", said["unpin prompt.txt"])
    assert "memory: 16 chunks removed" in said["evict requests.jsonl"]
    assert "nothing to clear" in said["clear --stale --yes"]
    assert "nothing to clear" in said["clear --generation 0a1b2c --yes"]
    assert "generations cleared: 1" in said["clear --yes"]


async def test_what_was_warmed_is_cached_and_ctrl_c_leaves_it(tmp_path: Path) -> None:
    slow = [*disk(tmp_path), "engine.prefill_tokens_per_s=400"]
    prompts = [[1 + index, *PROMPTS[0][1:]] for index in range(24)]  # over half a minute of the prefiller
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=slow) as subject:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvferry", "cache", "warm", "many.jsonl", "--url", subject.url,
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        first = await asyncio.wait_for(process.stdout.readline(), 60)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 130, err
        stopped = re.match(r"stopped: (\d+) of 24 were warmed, and stay\n$", err.decode())
        assert stopped and 1 <= int(stopped[1]) < 24
        number = int(re.match(rb"many.jsonl:(\d+): 513 tokens, 0 cached, 51. computed, 512 in the store", first)[1])

        async def idle() -> bool:
            reports = [await subject.node_info(node) for node in subject.nodes]
            return all(report.stats is not None and report.stats.running == 0 for report in reports)

        await subject.until(idle, 60)
        body = await subject.complete(prompts[number - 1], **GREEDY)
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 512


@with_redis
@pytest.mark.timeout(240)
async def test_other_weights_are_a_miss_and_the_old_generation_is_listed_and_cleared_everywhere(tmp_path: Path) -> None:
    with redis_server() as server:
        tiers = [*disk(tmp_path), f"tiers.redis={{url: '{server.url}'}}"]
        async with cluster(tmp_path, prefillers=1, decoders=1, overrides=tiers) as subject:
            for prompt in PROMPTS:
                await subject.complete(prompt, **GREEDY)
            (line,) = await in_tiers(subject, tmp_path, 32)
            old = line["fingerprint"]
            assert line["state"] == "live" and used(line)["memory"] >= 32
            code, out, _ = await kvferry(subject, tmp_path, "clear", "--stale", "--yes")
            assert code == 0 and "nothing to clear" in out
        async with cluster(
            tmp_path, prefillers=1, decoders=1, overrides=[*tiers, "engine.weights_version=v2"]
        ) as subject:
            found = await told(subject, tmp_path, "lookup", _body(tmp_path, PROMPTS[0]))
            assert found[0]["prompts"][0]["new_tokens"] == 513, "a miss"
            for prompt in PROMPTS:
                body = await subject.complete(prompt, **GREEDY)
                assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            live, stale = await in_tiers(subject, tmp_path, 32)
            assert (live["state"], stale["state"], stale["fingerprint"]) == ("live", "stale", old)
            assert used(stale)["redis"] == used(stale)["disk"] == 32 and "cluster" in stale["note"]
            before = await _disk_bytes(subject)
            code, out, err = await kvferry(subject, tmp_path, "clear", "--stale", "--yes")
            assert (code, err) == (0, "") and "redis: 32 chunks removed" in out
            (left,) = (await told(subject, tmp_path, "ls"))["generations"]
            assert left["fingerprint"] == live["fingerprint"]
            assert await _disk_bytes(subject) <= before // 2
            keys = server.ask(b"KEYS", b"kvf1:*")
            assert isinstance(keys, list) and not [key for key in keys if old.encode() in key]
            body = await subject.complete(PROMPTS[0], **GREEDY)
            assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 512, "the live one is untouched"


@with_redis
@pytest.mark.timeout(240)
async def test_what_another_cluster_uses_in_a_shared_redis_is_no_ones_to_clear(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    with redis_server() as server:
        redis = [f"tiers.redis={{url: '{server.url}'}}"]
        async with (
            cluster(one, prefillers=0, decoders=1, overrides=redis) as ours,
            cluster(two, prefillers=0, decoders=1, overrides=[*redis, "engine.weights_version=v2"]) as theirs,
        ):
            await theirs.complete(PROMPTS[0], **GREEDY)

            async def marked() -> bool:
                lines = (await told(ours, one, "ls"))["generations"]
                return [line["state"] for line in lines] == ["live", "marked"] and used(lines[1])["redis"] == 8

            await ours.until(marked, 60)
            for words in (["--stale"], []):
                code, out, _ = await kvferry(ours, one, "clear", "--yes", *words)
                assert code == 0 and "kept" in out and "used by two/decode-0@" in out
            found = await told(theirs, two, "lookup", _body(two, PROMPTS[0]))
            assert found[0]["prompts"][0]["new_tokens"] == 1


def _body(folder: Path, prompt: list[int]) -> str:
    (folder / "body.json").write_text(json.dumps({"prompt": prompt}))
    return "body.json"


async def _disk_bytes(subject: ClusterHandle) -> int:
    reports = [await subject.node_info(node) for node in subject.nodes]
    return sum(tier.used_bytes or 0 for report in reports for tier in report.tiers if tier.name == "disk")
