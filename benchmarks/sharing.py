"""What a cluster makes of prompts that are alike, of uneven or full memory, and of the death of its only decoder.

Whole clusters of real processes on the simulated engine, brought up by `kvferry up`:

- herd: 8 identical cold prompts of 2,049 tokens at once, against one alone; how often the prompt is computed in all;
- room: 60 prompts twice, which fit into the cluster's segments but not into the decoder's small one; what hits;
- full: no segment has room for a chunk: first token with a prefiller against first token without;
- burst: 16 requests at once on two decoders; how they are shared out;
- death: the only decoder is killed in the middle of a stream; the stream's longest gap.

Run: python -m benchmarks.sharing [--rounds 3]
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks.children import program
from kvcore.ports import listen
from kvcore.process.http_client import http_session
from kvcore.process.service import loop_factory

PROMPT = 2049
HERD = 8
BURST = 16
ROOM_PROMPTS = 60
TIMEOUT_S = 120.0


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on now."""
    sockets = [listen("127.0.0.1", 0) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Answer:
    """One streamed completion as its client saw it. Seconds since it was sent."""

    id: str = ""
    at_s: list[float] = field(default_factory=list)
    """When each event came."""
    cached: int = 0

    @property
    def ttft_s(self) -> float:
        """Until the first token."""
        return self.at_s[0]

    @property
    def longest_gap_s(self) -> float:
        """Between two events."""
        return max(after - before for before, after in zip(self.at_s, self.at_s[1:], strict=False))


class Cluster:
    """A running cluster: what is asked of its router."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session

    async def ask(self, prompt: list[int], max_tokens: int = 4, **more: object) -> Answer:
        """One streamed completion. RuntimeError if it is refused or ends in an error."""
        body = {"model": "sim", "prompt": prompt, "max_tokens": max_tokens, "seed": 1, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True, **more}
        answer, began, tokens = Answer(), time.monotonic(), 0
        async with self._session.post(f"{self._url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(await reply.text())
            async for line in reply.content:
                text = line.decode().strip()
                if not text.startswith("data: {"):
                    continue
                event = json.loads(text[6:])
                if "error" in event:
                    raise RuntimeError(text)
                answer.id = event["id"]
                if event.get("usage"):
                    answer.cached = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                if event["choices"] and event["choices"][0].get("token_ids"):
                    tokens += len(event["choices"][0]["token_ids"])
                    answer.at_s.append(time.monotonic() - began)
        if tokens != max_tokens:
            raise RuntimeError(f"{answer.id}: {tokens} tokens instead of {max_tokens}")
        return answer

    async def record(self, request: str) -> dict[str, Any]:
        """What the router says of a request that has ended."""
        while True:
            async with self._session.get(f"{self._url}/v1/requests/{request}") as reply:
                record: dict[str, Any] = await reply.json()
            if record.get("status") != "running":
                return record
            await asyncio.sleep(0.02)

    async def legs(self, answers: list[Answer]) -> list[dict[str, Any]]:
        """All legs of all these requests."""
        return [leg for answer in answers for leg in (await self.record(answer.id))["legs"]]


@asynccontextmanager
async def cluster(
    nodes: Mapping[str, tuple[str, str]], engine: Mapping[str, object]
) -> AsyncIterator[tuple[Cluster, int]]:
    """A cluster of `nodes`, name -> (role, segment), and the pid of its launcher."""
    ports = free_ports(len(nodes) + 2)
    raw = {
        "cluster": "sharing",
        "model": {"path": "sim", "name": "sim"},
        "engine": {"kind": "sim", "block_size": 16, "num_blocks": 2048, "bytes_per_token": 64, **engine},
        "kv": {"chunk_tokens": 64},
        "nodes": {
            name: {"role": role, "port": port, "segment": segment}
            for (name, (role, segment)), port in zip(nodes.items(), ports, strict=False)
        },
        "metadata_server": {"port": ports[-2], "node_ttl_s": 2.0, "records": {"kind": "memory"}},
        "router": {"port": ports[-1]},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cluster.yaml"
        file.write_text(yaml.safe_dump(raw))
        up = [sys.executable, "-m", "kvferry", "up", str(file), "--log-dir", folder]
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with program(up, r"ready: (\S+)") as launcher, http_session(timeout=timeout) as session:
            yield Cluster(launcher.said, session), launcher.pid


def prompt_of(seed: int, length: int = PROMPT) -> list[int]:
    """Tokens that no other seed shares a prefix with."""
    dice = random.Random(seed)
    return [dice.randrange(3, 250) for _ in range(length)]


def nodes_of(prefillers: int, decoders: int, segment: str = "8MiB") -> dict[str, tuple[str, str]]:
    """`p0 ... d0 ...`."""
    names = {f"p{number}": ("prefiller", segment) for number in range(prefillers)}
    return names | {f"d{number}": ("decoder", segment) for number in range(decoders)}


async def herd(prefillers: int, decoders: int) -> dict[str, float]:
    """Identical cold prompts at once."""
    engine = {"prefill_tokens_per_s": 4000, "max_batch_tokens": 512, "inter_token_s": 0.005}
    async with cluster(nodes_of(prefillers, decoders), engine) as (subject, _):
        alone = await subject.ask(prompt_of(1))
        answers = await asyncio.gather(*(subject.ask(prompt_of(2)) for _ in range(HERD)))
        computed = sum(leg["computed_tokens"] or 0 for leg in await subject.legs(list(answers)))
    return {
        "ttft_s": statistics.median(answer.ttft_s for answer in answers),
        "alone_ttft_s": alone.ttft_s,
        "computed_times": computed / PROMPT,
    }


async def room() -> dict[str, float]:
    """A decoder's segment of 2 MiB beside 16 MiB of others'."""
    nodes = {"p0": ("prefiller", "8MiB"), "s0": ("store", "8MiB"), "d0": ("decoder", "2MiB")}
    engine = {"prefill_tokens_per_s": 200000, "inter_token_s": 0.0, "max_batch_tokens": 8192}
    async with cluster(nodes, engine) as (subject, _):
        for _ in range(2):
            answers = [await subject.ask(prompt_of(number), 1) for number in range(ROOM_PROMPTS)]
    return {"hit_share": sum(answer.cached for answer in answers) / ROOM_PROMPTS / (PROMPT - 1)}


async def full() -> dict[str, float]:
    """Segments that are smaller than a chunk."""
    engine = {"prefill_tokens_per_s": 2000, "max_batch_tokens": 256, "inter_token_s": 0.005}
    found = {}
    for name, nodes in (("ttft_s", nodes_of(1, 1, "2KiB")), ("no_prefiller_ttft_s", nodes_of(0, 1, "2KiB"))):
        async with cluster(nodes, engine) as (subject, _):
            found[name] = statistics.median([(await subject.ask(prompt_of(number), 1)).ttft_s for number in range(3)])
    return found


async def burst() -> dict[str, float]:
    """Requests that arrive at once."""
    async with cluster(nodes_of(1, 2), {"prefill_tokens_per_s": 20000, "inter_token_s": 0.005}) as (subject, _):
        answers = await asyncio.gather(*(subject.ask(prompt_of(number, 100), 32) for number in range(BURST)))
        nodes = [leg["node"] for leg in await subject.legs(list(answers)) if leg["kind"] == "decode"]
    return {"most_on_one_decoder": float(max(nodes.count("d0"), nodes.count("d1")))}


def pid_of(launcher: int, node: str) -> int:
    """The process of `node` among the launcher's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for task in Path(f"/proc/{launcher}/task").iterdir():
        children += (task / "children").read_text().split()
    for pid in set(children):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if node.encode() in words:
            return int(pid)
    raise RuntimeError(f"no process of {node} under {launcher}")


async def death() -> dict[str, float]:
    """The only decoder is killed with SIGKILL after about 40 of 200 tokens."""
    async with cluster(nodes_of(1, 1), {"prefill_tokens_per_s": 20000, "inter_token_s": 0.01}) as (subject, launcher):
        await subject.ask(prompt_of(1), 4)
        stream = asyncio.create_task(subject.ask(prompt_of(2), 200))
        await asyncio.sleep(0.6)
        os.kill(pid_of(launcher, "d0"), signal.SIGKILL)
        try:
            return {"longest_gap_s": (await stream).longest_gap_s}
        except RuntimeError as error:
            print(f"  the stream ended in an error: {str(error)[:150]}")
            return {"longest_gap_s": TIMEOUT_S}


EXPERIMENTS = {
    "herd 1P1D": lambda: herd(1, 1),
    "herd 2P2D": lambda: herd(2, 2),
    "room": room,
    "full": full,
    "burst": burst,
    "death": death,
}


async def measure(rounds: int, wanted: list[str]) -> dict[str, float]:
    """Medians over the rounds, by experiment and figure."""
    result: dict[str, float] = {}
    for name in wanted or EXPERIMENTS:
        found = [await EXPERIMENTS[name]() for _ in range(rounds)]
        medians = {figure: statistics.median(one[figure] for one in found) for figure in found[0]}
        print(f"{name:<12}" + "".join(f"  {figure} {value:.3f}" for figure, value in medians.items()), flush=True)
        result |= {f"{name.replace(' ', '_').lower()}_{figure}": round(value, 4) for figure, value in medians.items()}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], choices=list(EXPERIMENTS))
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        result = runner.run(measure(options.rounds, options.only))
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
