"""What a router costs with 4, 40, 400 and 1,000 nodes: its probes, a request, a choice.

Three processes, as in `benchmarks.router`: the nodes, each on a port of its own, one router after the other, and the
load generator. By number of nodes, RESULT has
- `choice_us`: choosing a prefiller and a decoder while each choice counts as load, in this process;
- `probing_share`: of a core, of a router that has nothing to do; `longest_ms`: of 500 questions for `/health` that it
  was asked meanwhile the longest but five, which is what probes hold up;
- `cpu_us_per_request`: its processor time for a request of one token, 8 at a time, probes subtracted.

Estimate: a probe is a call (40 us) and a report that is read (10 us), so 1,000 a second take 5 % of a core. A choice
looks at each node in four short loops of 0.03 us.
Run: chrt -r 1 python -m benchmarks.router_nodes [--nodes 4 40 400 1000] [--seconds 10]
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from benchmarks.children import Child, program
from benchmarks.router import Load, Way, generate, until_served
from benchmarks.router_mocks import ROLES, report
from kvcore.clock import SystemClock
from kvcore.config.file import load_config
from kvcore.http.pool import HttpPool
from kvcore.process.descriptors import raise_limit
from router.nodes.cluster import Cluster
from router.routing.policy import make_policy
from router.routing.views import RouteRequest

CHOICES, QUESTIONS, PROMPT = 2000, 500, 1900


def written(folder: Path, ports: list[int]) -> Path:
    """A cluster file with these nodes."""
    count = len(ports)
    nodes = {f"n{n}": {"role": ROLES[n * len(ROLES) // count], "port": port} for n, port in enumerate(ports)}
    parts = {
        "cluster": "router-benchmark",
        "model": {"path": "none", "name": "mock"},
        "engine": {"kind": "sim"},
        "nodes": nodes,
        "router": {"port": 0},
        "metadata_server": {"port": 1},
    }
    file = folder / f"{count}.yaml"
    file.write_text(json.dumps(parts))
    return file


def choice_us(file: Path) -> float:
    """Of one choice, the median."""
    config = load_config(file, [])
    cluster, policy, taken = Cluster(config, SystemClock()), make_policy(config.router.policy), []
    for node in cluster.nodes.values():
        cluster.reported(node, report(node.id, node.role))
    for turn in range(CHOICES):
        request = RouteRequest(prompt_tokens=PROMPT, completion_tokens=1, min_prefill_tokens=0, turn=turn)
        began = time.perf_counter()
        route = policy.choose(request, cluster.view()).route
        taken.append(time.perf_counter() - began)
        assert route is not None and route.prefiller is not None, "each node is there and has nothing cached"
        cluster.work_chosen(route.decoder, sequences=1, prefill_tokens=0)
        cluster.work_chosen(route.prefiller, sequences=0, prefill_tokens=PROMPT)
    return statistics.median(taken) * 1e6


async def probing(router: Child, url: str, seconds: float) -> dict[str, float]:
    """Share of a core, and what a question waits, while nothing but probes happens."""
    pool = HttpPool(connect_timeout_s=5.0, max_connections=4, keepalive_s=30.0, headers={})
    before, began = router.cpu_s(), time.perf_counter()
    await asyncio.sleep(seconds)
    share = (router.cpu_s() - before) / (time.perf_counter() - began)
    waited = []
    for _ in range(QUESTIONS):
        began = time.perf_counter()
        (await pool.call("GET", f"{url}/health", b"", 10.0)).end()
        waited.append(time.perf_counter() - began)
        await asyncio.sleep(0.005)
    pool.close()
    return {"probing_share": round(share, 4), "longest_ms": round(sorted(waited)[-6] * 1e3, 1)}


async def measure(count: int, seconds: float, requests: int) -> dict[str, float]:
    """With so many nodes."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mocks = program([sys.executable, "-m", "benchmarks.router_mocks", str(count)], r"^ports (.*)")
        ports: list[int] = json.loads((await stack.enter_async_context(mocks)).said)
        file = written(folder, ports)
        command = [sys.executable, "-m", "router", "--config", str(file)]
        router = await stack.enter_async_context(program(command, r"url=\"?http://[^\s\"]+:(\d+)"))
        way = Way(f"{count} nodes", int(router.said), router)
        await until_served(way)
        await asyncio.sleep(2.0)  # every node has been asked
        result = await probing(router, f"http://127.0.0.1:{router.said}", seconds)
        load = Load("c8", requests, ["--clients", "8"])
        rounds = [await generate(way, load, [], scale) for scale in (0.2, 1.0, 1.0, 1.0)][1:]
        spent = [took["cpu_us"] - result["probing_share"] / took["rps"] * 1e6 for took in rounds]
        result |= {"choice_us": round(choice_us(file)), "cpu_us_per_request": round(statistics.median(spent))}
    print(f"{count:>6}" + "".join(f"{result[name]:>22}" for name in sorted(result)), flush=True)
    return result


async def run(arguments: argparse.Namespace) -> None:
    """One after the other."""
    columns = ("choice_us", "cpu_us_per_request", "longest_ms", "probing_share")
    print(f"{'nodes':>6}" + "".join(f"{name:>22}" for name in columns))
    result = {n: await measure(n, arguments.seconds, arguments.requests) for n in arguments.nodes}
    print("RESULT " + json.dumps({"nodes": result}))


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 40, 400, 1000])
    parser.add_argument("--seconds", type=float, default=10.0, help="that probes are watched for")
    parser.add_argument("--requests", type=int, default=2000, help="in each of three rounds")
    raise_limit()
    uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
