"""The files and commands that LMCache's users have, as they stand, for a real `kvferry serve` on a simulated engine."""

import asyncio
import contextlib
import os
import random
import socket
import sys
from pathlib import Path

import pytest
from support.lmcache_files import MOONCAKE_PREFILLER, NATIVE, TUTORIAL
from support.mooncake_server import needs_mooncake
from support.redis_server import USUAL_PORT, redis_server, with_redis
from support.serve_process import Served, served

pytestmark = [pytest.mark.slow]

CHUNK = 256
PROMPT = random.Random(5).choices(range(3, 250), k=2 * CHUNK + 9)
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "0,1"}


def file_of(folder: Path, text: str) -> dict[str, str]:
    """The environment that names the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lmcache-config.yaml").write_text(text)
    return {**ENVIRONMENT, "LMCACHE_CONFIG_FILE": str(folder / "lmcache-config.yaml")}


async def twice(one: Served, prompt: list[int] = PROMPT) -> int:
    """How much of a prompt is cached the second time; the answer is the same."""
    answer, cached = await one.ask(prompt)
    assert cached == 0
    again, cached = await one.ask(prompt)
    assert again == answer
    return cached


def said(one: Served) -> dict[str, str]:
    """What became of each key, as it was printed."""
    notes = [line.removeprefix("LMCache's ").partition(": ") for line in one.lines if line.startswith("LMCache's ")]
    return {key: text for key, _, text in notes}


def is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False


@with_redis
async def test_the_tutorials_redis_is_used_though_lmcache_ignores_it(tmp_path: Path) -> None:
    if not is_free(USUAL_PORT):
        pytest.skip(f"the file names port {USUAL_PORT}, which is another's here")
    environment = file_of(tmp_path, TUTORIAL)
    with redis_server(port=USUAL_PORT) as server:
        async with served(tmp_path / "one", environment=environment) as one:
            answer, cached = await one.ask(PROMPT)
            assert cached == 0
            notes = said(one)
            async with asyncio.timeout(60):
                while len(server.ask(b"KEYS", b"kvf1:{*")) < 2:  # type: ignore[arg-type]  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        assert notes == {
            "storage": "mapped: tiers.redis.url: redis://localhost:6379 "
            "(LMCache itself ignores `storage`, its key is remote_url)",
            "chunk_size": "mapped: kv.chunk_tokens: 256",
            "max_local_cpu_size": notes["max_local_cpu_size"],
        }
        assert notes["max_local_cpu_size"].startswith("mapped: nodes.*.segment: 10GB")
        assert "LMCache reads no unit" in notes["max_local_cpu_size"]
        async with served(tmp_path / "two", environment=environment) as two:
            assert await two.ask(PROMPT) == (answer, 2 * CHUNK), "what the first one left in the Redis"


async def test_without_the_redis_that_the_file_names_requests_are_answered_all_the_same(tmp_path: Path) -> None:
    text = TUTORIAL.replace(str(USUAL_PORT), "1")
    async with served(tmp_path / "one", environment=file_of(tmp_path, text)) as one:
        assert await twice(one) == 2 * CHUNK


@needs_mooncake[1]
@needs_mooncake[2]
async def test_the_native_spelling_serves_though_its_mooncake_is_away(tmp_path: Path) -> None:
    async with served(tmp_path / "one", environment=file_of(tmp_path, NATIVE)) as one:
        assert await twice(one) == 2 * CHUNK
        notes = said(one)
        assert notes["remote_serde"] == "ignored: tiers hold chunks as they are"
        assert notes["remote_url"].startswith("mapped: tiers.mooncake.master: 127.0.0.1:50051")
        assert set(notes) >= {"extra_config.local_hostname", "extra_config.transfer_timeout", "local_cpu"}
        assert len(notes) == 13


@pytest.mark.skipif(Path("/sys/class/infiniband/mlx5_0").exists(), reason="this machine has the device")
async def test_a_prefiller_over_rdma_is_refused_by_the_name_of_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    environment = {**os.environ, **file_of(tmp_path, MOONCAKE_PREFILLER), "XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "kvferry", "serve", str(tmp_path / "model"), "--segment", "16MiB"]
    command += ["--set", "engine={kind: sim, bytes_per_token: 64}", "--set", "model.path=sim"]
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, err = await process.communicate()
    assert process.returncode == 2 and ("mlx5_0" in err.decode() or "libucp" in err.decode()), err.decode()


async def test_the_variables_are_obeyed_obeyed_and_ignored_with_a_word(tmp_path: Path) -> None:
    environment = {
        **ENVIRONMENT,
        "LMCACHE_CHUNK_SIZE": "128",
        "LMCACHE_MAX_LOCAL_CPU_SIZE": '"8GB"',
        "LMCACHE_USE_EXPERIMENTAL": "True",
    }
    async with served(tmp_path / "one", environment=environment) as one:
        assert await twice(one) == 4 * 128
        notes = said(one)
        assert notes["chunk_size"] == "mapped: kv.chunk_tokens: 128"
        assert notes["max_local_cpu_size"].startswith("mapped: nodes.*.segment: 8GB")
        assert notes["use_experimental"].startswith("ignored: ")


@pytest.mark.parametrize("text", [TUTORIAL, MOONCAKE_PREFILLER, NATIVE], ids=["tutorial", "prefiller", "native"])
async def test_each_file_is_printed_as_a_part_of_a_cluster_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "lm.yaml").write_text(text)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvferry", "config", "from-lmcache", str(tmp_path / "lm.yaml"),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    keys = [line.partition(":")[0] for line in text.splitlines() if line[0] not in " #" and line[:5] != "extra"]
    assert [f"# {key}: " in out.decode() for key in keys] == [True] * len(keys)
