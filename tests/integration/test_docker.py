"""The image and the compose file, built and run by a Docker daemon of the test's own, where one can be started."""

import asyncio
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from support.docker_daemon import BASE, docker_daemon, import_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(800)]

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose" / "redis.yaml"
CHUNKS, CHUNK_TOKENS = 6, 64
CLUSTER = {
    "cluster": "simulated",
    "model": {"path": "sim", "name": "sim"},
    "engine": {"kind": "sim", "block_size": 16, "num_blocks": 512, "bytes_per_token": 64},
    "kv": {"chunk_tokens": CHUNK_TOKENS},
    "nodes": {"decode-0": {"role": "decoder", "port": 8200, "segment": "16MiB"}},
    "tiers": {"redis": {"url": "redis://redis:6379"}},
    "router": {"host": "0.0.0.0", "port": 8000},
    "security": {"open": True},
}
PROMPT = random.Random(1).choices(range(3, 250), k=CHUNK_TOKENS * CHUNKS + 1)
BODY = {"model": "sim", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def test_an_instance_of_compose_hits_what_another_one_computed(tmp_path: Path) -> None:
    simulated = tmp_path / "simulated.yaml"
    command = ["up", "/model/cluster.yaml"]  # `serve` wants torch or vLLM, which are too large for this
    simulated.write_text(yaml.safe_dump({"version": "3.7", "services": {"kvferry": {"command": command}}}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    with docker_daemon() as environment:
        environment |= {"MODEL": str(tmp_path / "model"), "BASE": BASE, "REDIS_IMAGE": BASE, "EXTRAS": ""}
        environment |= {"PIP_OPTIONS": "--no-index --no-build-isolation", "REDIS_MEMORY": "64mb"}

        def run(*command: str) -> str:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            return done.stdout

        compose = ("docker-compose", "-f", str(COMPOSE), "-f", str(simulated))
        import_base(environment)
        run(*compose, "config", "-q")
        run(*compose, "up", "-d", "--build", "--scale", "kvferry=3")
        try:
            containers = run(*compose, "ps", "-q", "kvferry").split()
            assert len(containers) == 3
            places = [json.loads(run("docker", "inspect", one))[0] for one in containers]
            assert {place["Config"]["User"] for place in places} == {"10001:10001"}
            answers = asyncio.run(_in_turn([_url_of(place) for place in places]))
            (tokens, cached), *others = answers
            assert cached == 0
            assert others == [(tokens, CHUNKS * CHUNK_TOKENS)] * 2
            states = [json.loads(run("docker", "inspect", one))[0]["State"] for one in containers]
            assert {state["Status"] for state in states} == {"running"}
            assert all(state["Health"]["Status"] != "unhealthy" for state in states)
        except BaseException:
            print(run(*compose, "logs", "--no-color"))
            raise
        finally:
            run(*compose, "down", "-t", "5")


def _url_of(place: dict[str, Any]) -> str:
    """As published on this machine."""
    return f"http://127.0.0.1:{place['NetworkSettings']['Ports']['8000/tcp'][0]['HostPort']}"


async def _in_turn(urls: list[str]) -> list[tuple[list[int], int]]:
    """Tokens and cached tokens of each one's answer; before the second one is asked the Redis has what the first has
    saved."""
    answers = []
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(_ready(session, url) for url in urls))
        for url in urls:
            async with session.post(f"{url}/v1/completions", json={**BODY, "return_token_ids": True}) as reply:
                answer = await reply.json()
                assert reply.status == 200, answer
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            answers.append((answer["choices"][0]["token_ids"], cached))
            if len(answers) == 1:
                await _saved(session, url)
    return answers


async def _ready(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(300):  # nine processes begin at once, and compile what they import
        while True:
            try:
                async with session.get(f"{url}/health") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)


async def _saved(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(30):
        while True:
            async with session.get(f"{url}/v1/cluster") as reply:
                (node,) = (await reply.json())["nodes"]
            if sum(tier["counts"].get("saved", 0) for tier in node["tiers"]) >= CHUNKS:
                return
            await asyncio.sleep(0.1)
