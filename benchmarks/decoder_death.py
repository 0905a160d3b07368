"""How long does a stream stand still whose only decoder is killed? A whole cluster of real processes, one of each node.

Each round streams a completion, sends SIGKILL to the decoder's service in its midst, reads on to the end and waits
until the decoder is back. The gap is the longest silence between two events from the kill on, beside the median step of
the same stream before it.

Estimate: the router sees the broken connection within a millisecond; the prefiller then computes prompt and tokens so
far, less what its own cache and the store have left of them: a prompt's prefill, and no restart of an engine. Before
prefillers decoded in need it was 15 s and an error.
Run: python -m benchmarks.decoder_death [--config configs/laptop.yaml] [--deaths 5] [--prompt-tokens 500]
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import aiohttp

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.ports import listen
from kvcore.process.http_client import http_session
from kvcore.process.service import loop_factory
from kvcore.types import Role
from kvferry.launch.launcher import Launcher

MAX_TOKENS = 120
KILL_AFTER = 30
POLL_S = 0.1


def free_ports(config: ClusterConfig) -> list[str]:
    """Overrides that put every listener of the file on a free port of its own."""
    keys = ["router.port", "metadata_server.port", *(f"nodes.{name}.port" for name in config.nodes)]
    sockets = [listen("127.0.0.1", 0) for _ in keys]
    overrides = [f"{key}={one.getsockname()[1]}" for key, one in zip(keys, sockets, strict=True)]
    for one in sockets:
        one.close()
    return overrides


async def events(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> AsyncIterator[dict[str, object]]:
    """Of one streamed completion. Raises RuntimeError for an error in it."""
    async with session.post(f"{url}/v1/completions", json=body | {"stream": True}) as reply:
        async for line in reply.content:
            data = line.strip().removeprefix(b"data: ")
            if data and data != b"[DONE]" and not data.startswith(b":"):
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                yield event


async def one_death(session: aiohttp.ClientSession, launcher: Launcher, body: dict[str, object], decoder: str) -> tuple:
    """(longest gap from the kill on, median step before it), seconds, and the id of the request."""
    now = asyncio.get_running_loop().time
    before: list[float] = []
    after: list[float] = []
    steps, last, request_id = before, now(), ""
    async with aclosing(events(session, launcher.router_url, body)) as stream:  # type: ignore[type-var]  # a generator
        async for event in stream:
            steps.append(now() - last)
            last, request_id = now(), str(event["id"])
            if steps is before and len(before) == KILL_AFTER:
                os.kill(launcher.pids[decoder], signal.SIGKILL)
                steps = after
    return max(after), statistics.median(before[1:]), request_id


async def until_usable(session: aiohttp.ClientSession, url: str, node: str) -> None:
    """Until the router uses this node."""
    while True:
        async with session.get(f"{url}/v1/cluster") as reply:
            if any(item["id"] == node and item["healthy"] for item in (await reply.json())["nodes"]):
                return
        await asyncio.sleep(POLL_S)


async def run(config_file: Path, deaths: int, prompt_tokens: int) -> None:
    """All rounds; a line each, and the RESULT."""
    overrides = free_ports(load_config(config_file))
    config = load_config(config_file, overrides)
    (decoder,) = [name for name, node in config.nodes.items() if node.role is Role.DECODER]
    gaps: list[float] = []
    with tempfile.TemporaryDirectory() as logs:
        launcher = Launcher(config, config_file, overrides=overrides, log_dir=Path(logs))
        async with launcher, http_session() as session:
            await launcher.wait_ready(config.service.start_s)
            for number in range(deaths):
                await until_usable(session, launcher.router_url, decoder)
                draw = random.Random(number)
                body: dict[str, object] = {
                    "model": config.model.name,
                    "prompt": [draw.randrange(1, 20_000) for _ in range(prompt_tokens)],
                    "max_tokens": MAX_TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                    "return_token_ids": True,
                }
                old = launcher.pids[decoder]
                gap_s, step_s, request_id = await one_death(session, launcher, body, decoder)
                async with session.get(f"{launcher.router_url}/v1/requests/{request_id}") as reply:
                    nodes = [leg["node"] for leg in (await reply.json())["legs"] if leg["kind"] == "decode"]
                print(f"{gap_s * 1e3:8.0f} ms, {step_s * 1e3:.1f} ms a step before; decoded by {', '.join(nodes)}")
                gaps.append(gap_s)
                await launcher.wait_restarted(decoder, old, config.service.start_s)
    figures = {"gap_p50_ms": round(statistics.median(gaps) * 1e3), "gap_max_ms": round(max(gaps) * 1e3)}
    print("RESULT " + json.dumps({"deaths": deaths, "prompt_tokens": prompt_tokens, **figures}))


def main() -> None:
    """Print the rounds and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/laptop.yaml"))
    parser.add_argument("--deaths", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=500)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run(arguments.config, arguments.deaths, arguments.prompt_tokens))


if __name__ == "__main__":
    main()
