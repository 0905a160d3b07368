"""What routers add to a request: OpenAI completions to mock workers that answer at once, directly, through ours, and
through other projects' routers, with one client and one set of workers.

Three processes: the workers (`router_mocks`), one router at a time, and the load generator (`router_load`), which both
cost a tenth of a router. A prompt of 1900 characters, another one each time, goes to a prefiller and a decoder; one
token comes back. Streams have 256 tokens, one each 4 ms, 32 streams at a time. Of all ways each load is measured by
turns, so that noise meets all of them; medians. Ours is there twice: as other projects' routers send text on, it is
measured with tokens that cost nothing (a byte each); and with the demo model's tokenizer, which also gives
`ms_100kb_repeat`.

`--processes 2` measures ours a third time, as two processes on one port (`router.processes`), whose processor time is
added up: RESULT then has `rps_c32_2` and `cpu_us_per_request_2`. What rate N processes reach shows only where they, the
workers and the load generator have a core each; where the machine has fewer that is said, and the processor time of a
request is what can be compared.

Estimate: a call with msgpack costs 0.1 ms of a router's processor, and there are two; the prompt is parsed, tokenized
(0.4 ms for 1900 characters), hashed and encoded twice.
Run: chrt -r 1 python -m benchmarks.router [--rounds 5] [--pin] [--processes 2] [--peers-python VENV/bin/python]
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from benchmarks.children import Child, program
from benchmarks.router_mocks import ROLES
from benchmarks.router_peers import PEERS, missing, peer
from kvcore.errors import ConfigError
from kvcore.ports import listen
from kvferry.demo.model import MODEL_NAME

CONFIG = """
cluster: router-benchmark
model: {{path: {path}, name: mock}}
engine: {{kind: sim}}
nodes: {nodes}
router: {{port: 0}}
metadata_server: {{port: 1}}
"""
STREAM_TOKENS = 256
LARGE_CHARS = 100_000
TOKENIZING = "kvferry+tokens"


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of load, and the words by which the generator gets it."""

    name: str
    requests: int
    words: Sequence[str]
    counts: Callable[["Way"], bool] = lambda _way: True


@dataclass(frozen=True, slots=True)
class Children:
    """Processes that are one router."""

    each: Sequence[Child]

    def cpu_s(self) -> float:
        """Of all of them."""
        return sum(child.cpu_s() for child in self.each)


@dataclass(slots=True)
class Way:
    """To the workers. `router` None: directly. `taken`: what each round of each load gave."""

    name: str
    port: int
    router: Child | Children | None
    taken: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def median(self, load: str, what: str) -> float:
        """Over the rounds."""
        return statistics.median(one[what] for one in self.taken[load])


def loads(requests: int) -> list[Load]:
    """What is measured of each way."""
    streams, large = max(32, requests // 20), max(10, requests // 20)
    return [
        Load("c1", requests, ["--clients", "1"]),
        Load("c32", 3 * requests, ["--clients", "32"]),
        Load("stream", streams, ["--clients", "32", "--tokens", str(STREAM_TOKENS), "--stream"]),
        Load("100kb", large, ["--clients", "1", "--chars", str(LARGE_CHARS), "--same"]),
    ]


async def generate(way: Way, load: Load, pinned: Sequence[str], scale: float = 1.0) -> dict[str, float]:
    """One round of a load; `cpu_us`: the router's processor time a request."""
    count = max(2, int(load.requests * scale))
    command = [*pinned, sys.executable, "-m", "benchmarks.router_load", str(way.port), *load.words]
    before = way.router.cpu_s() if way.router else 0.0
    async with program([*command, "--requests", str(count)], r"^LOAD (.*)", within_s=120.0) as done:
        spent = (way.router.cpu_s() if way.router else 0.0) - before
        said: dict[str, float] = json.loads(done.said)
    return {**said, "cpu_us": spent / count * 1e6}


async def until_served(way: Way, within_s: float = 40.0) -> None:
    """Until a completion comes back."""
    first = Load("first", 2, ["--clients", "1"])
    async with asyncio.timeout(within_s):
        while True:
            try:
                await generate(way, first, [])
                return
            except RuntimeError:
                await asyncio.sleep(0.3)


def figures(way: Way, direct: Way) -> dict[str, float]:
    """What is published of one router."""
    p50 = way.median("c1", "p50_ms")
    of_stream = way.median("stream", "cpu_us") - way.median("c32", "cpu_us")
    return {
        "p50_ms": round(p50, 3),
        "added_p50_ms": round(p50 - direct.median("c1", "p50_ms"), 3),
        "rps_c1": round(way.median("c1", "rps")),
        "rps_c32": round(way.median("c32", "rps")),
        "cpu_us_per_request": round(way.median("c32", "cpu_us")),
        "cpu_us_per_token": round(of_stream / (STREAM_TOKENS - 1), 1),
        "ms_100kb_repeat": round(way.median("100kb", "p50_ms"), 2),
    }


async def measure(ways: Sequence[Way], rounds: int, requests: int, pinned: Sequence[str]) -> None:
    """Fill in what the ways took, and print the table."""
    for load in loads(requests):
        for number in range(rounds + 1):
            for way in ways:
                took = await generate(way, load, pinned, 1.0 if number else 0.2)
                if number:  # the first round warms
                    way.taken.setdefault(load.name, []).append(took)
        print(f"{load.name:>8}{'p50 ms':>10}{'p99 ms':>10}{'req/s':>10}{'router cpu us':>15}")
        for way in ways:
            p50, p99, rate, cpu = (way.median(load.name, what) for what in ("p50_ms", "p99_ms", "rps", "cpu_us"))
            print(f"{way.name:>15} {p50:>10.3f}{p99:>10.3f}{rate:>10.0f}{cpu:>15.0f}", flush=True)


def our_models() -> dict[str, str]:
    """The paths of models by the way's name: no tokenizer, and the demo model's, where that has been made."""
    folder = Path("~/.cache/kvferry/models").expanduser() / MODEL_NAME
    if (folder / "tokenizer.json").exists():
        return {"kvferry": "none", TOKENIZING: str(folder)}
    print(f"{TOKENIZING} is not measured: there is no demo model, `kvferry demo` makes it")
    return {"kvferry": "none"}


def written(folder: Path, name: str, path: str, ports: Sequence[int]) -> Path:
    """A cluster file."""
    config = folder / f"{name}.yaml"
    listed = {f"n{n}": {"role": role, "port": ports[n]} for n, role in enumerate(ROLES)}
    config.write_text(CONFIG.format(nodes=json.dumps(listed), path=path))
    return config


def free_ports(count: int) -> int:
    """The first of so many in a row."""
    while True:
        with listen("127.0.0.1", 0) as first, ExitStack() as held:
            port = int(first.getsockname()[1])
            with suppress(ConfigError, OverflowError):
                for more in range(port + 1, port + count):
                    held.enter_context(listen("127.0.0.1", more))
                return port


async def several(stack: AsyncExitStack, ports: Sequence[int], pins: Sequence[Sequence[str]]) -> Way:
    """One router of ours that is as many processes as there are pins, up until the stack ends."""
    count, port = len(pins), free_ports(len(pins) + 1)
    config = written(Path(stack.enter_context(tempfile.TemporaryDirectory())), "several", "none", ports)
    command = [sys.executable, "-m", "router", "--config", str(config)]
    command += ["--set", f"router.port={port}", "--set", f"router.processes={count}"]
    each = []
    for number, pin in enumerate(pins, start=1):
        started = program([*pin, *command, "--process", str(number)], r"own=\"?(http://[^\s\"]+)")
        each.append(await stack.enter_async_context(started))
    return Way(f"kvferry x{count}", port, Children(each))


async def ours(stack: AsyncExitStack, ports: Sequence[int], pinned: Sequence[str]) -> list[Way]:
    """Our routers, up until the stack ends."""
    folder, ways = Path(stack.enter_context(tempfile.TemporaryDirectory())), []
    for name, path in our_models().items():
        config = written(folder, name, path, ports)
        command = [*pinned, sys.executable, "-m", "router", "--config", str(config)]
        router = await stack.enter_async_context(program(command, r"url=\"?http://[^\s\"]+:(\d+)"))
        ways.append(Way(name, int(router.said), router))
    return ways


async def theirs(stack: AsyncExitStack, python: Path | None, ports: Sequence[int], pinned: Sequence[str]) -> list[Way]:
    """Other projects' routers, up until the stack ends; says which are not there."""
    lacking = dict.fromkeys(PEERS, "no --peers-python") if python is None else missing(python)
    for name, why in lacking.items():
        print(f"{name} is not measured: {why}")
    ways = []
    for name in [name for name in PEERS if name not in lacking]:
        assert python is not None
        running, port = await stack.enter_async_context(peer(name, python, ports, pinned))
        ways.append(Way(name, port, running))
    return ways


def placed(processes: int, pin: bool) -> tuple[list[list[str]], list[str], list[str]]:
    """What pins each of a router's processes, the workers and the load generator: to a core each, as far as there are
    some. Says what fewer do not show."""
    cores = os.cpu_count() or 1
    if processes > 1 and cores < processes + 2:
        print(
            f"{cores} cores for {processes} processes, the workers and the load generator: they take turns: the "
            f"rate of x{processes} is no measure of what so many cores would give; processor time a request is"
        )
    if not pin:
        return [[] for _ in range(processes)], [], []
    on = [["taskset", "-c", str(core % cores)] for core in range(processes + 2)]
    if cores < processes + 2:  # the routers on the first half, or the one core, the rest on the others
        first = max(1, cores // 2)
        on = [["taskset", "-c", str(number % first)] for number in range(processes)]
        rest = ["taskset", "-c", str(cores - 1)]
        return on, rest, rest
    return on[:processes], on[processes], on[processes + 1]


async def run(arguments: argparse.Namespace) -> None:
    """Bring the processes up, measure, print RESULT."""
    pins, workers, beside = placed(arguments.processes, arguments.pin)
    apart = pins[0]
    async with AsyncExitStack() as stack:
        mocks = program([*workers, sys.executable, "-m", "benchmarks.router_mocks"], r"^ports (.*)")
        ports: list[int] = json.loads((await stack.enter_async_context(mocks)).said)
        direct, own = Way("direct", ports[2], None), await ours(stack, ports, apart)
        split = [await several(stack, ports, pins)] if len(pins) > 1 else []
        others = await theirs(stack, arguments.peers_python, ports, apart)
        for way in (*own, *split, *others):
            await until_served(way)
        await measure([direct, *own, *split, *others], arguments.rounds, arguments.requests, beside)
    result: dict[str, object] = {"direct_p50_ms": round(direct.median("c1", "p50_ms"), 3)}
    result |= figures(own[0], direct)
    if (tokenizing := {way.name: way for way in own}.get(TOKENIZING)) is not None:
        result["ms_100kb_repeat"] = round(tokenizing.median("100kb", "p50_ms"), 2)
        result["tokenizing"] = figures(tokenizing, direct)
    for way in split:
        found = figures(way, direct)
        result |= {f"{what}_{len(pins)}": found[what] for what in ("rps_c32", "cpu_us_per_request")}
        result["cores"] = os.cpu_count()
    result["peers"] = {way.name: figures(way, direct) for way in others}
    print("RESULT " + json.dumps(result))


def main() -> None:
    """Print the tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1000, help="of one client, in a round")
    parser.add_argument("--pin", action="store_true", help="the router on core 0, workers and load on others")
    parser.add_argument("--processes", type=int, default=1, help="also measure ours as so many processes on one port")
    parser.add_argument("--peers-python", type=Path, help="of an environment with other projects' routers")
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
