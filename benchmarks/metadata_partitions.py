"""An index of one metadata server beside the same over two partitions: keys a second through the production client.

`python -m benchmarks.metadata_partitions [--partitions 1 2] [--prompts 400] [--sizes 64 1000] [--rounds 3]`. Sixteen
requests at a time, by turns; each server is a process of its own, the client is one. With two cores the client and two
servers share them: what is seen there is what splitting costs, and each server's time for a key, not what more machines
would bring.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import uvloop

from benchmarks.children import Child, program
from benchmarks.metadata import CLUSTER, CONNECTIONS, HOST, NODES, Prompt, registrations, reservation
from kvcore.clock import SystemClock
from kvcore.config.file import load_config
from kvcore.config.servers import addresses_of
from kvcore.partitions import Partitions
from kvcore.ports import listen
from kvcore.types import ChunkKey
from kvnode.partitions.slices import of_part
from metadata_server.client import MetadataClient
from metadata_server.connect import connect_client, endpoints_of
from metadata_server.messages import MatchRequest, RegisterRequest, ReplicaIds


async def store(client: MetadataClient, number: int, keys: Prompt) -> None:
    """Reserve and commit one prompt."""
    reply = await client.reserve(reservation(number, keys))
    ids = [outcome.replica.id for outcome in reply.outcomes if outcome.replica is not None]
    assert len(ids) == len(keys), "room ran out"
    request = ReplicaIds(node_id=NODES[number % len(NODES)], incarnation=1, replica_ids=ids)
    assert all((await client.commit(request)).committed)


async def match(client: MetadataClient, _: int, keys: Prompt) -> None:
    """Ask for one prompt."""
    assert len((await client.match(MatchRequest(keys=keys, in_order=True))).replicas) == len(keys)


async def rate(
    client: MetadataClient, prompts: list[Prompt], one: Callable[[MetadataClient, int, Prompt], Awaitable[None]]
) -> tuple[float, float]:
    """Keys a second, and the 99th percentile of `one` in ms."""
    work, took = iter(enumerate(prompts)), list[float]()

    async def run() -> None:
        for number, keys in work:
            began = perf_counter()
            await one(client, number, keys)
            took.append(perf_counter() - began)

    started = perf_counter()
    await asyncio.gather(*(run() for _ in range(CONNECTIONS)))
    return sum(map(len, prompts)) / (perf_counter() - started), sorted(took)[int(len(took) * 0.99)] * 1e3


async def registered(client: MetadataClient, request: RegisterRequest) -> None:
    """The node, at each partition with its slice."""
    for part in client.parts:
        manifests = [of_part(manifest, part.part) for manifest in request.segments]
        await part.register(RegisterRequest(node=request.node, segments=manifests, ttl_s=request.ttl_s))


async def measure(count: int, size: int, prompts: int, folder: Path) -> dict[str, float]:
    """Of fresh servers: `prompts` of `size` chunks each, stored and then found."""
    common = {"records": {"kind": "memory"}, "node_ttl_s": 3600.0, "timeout_s": 30.0}
    servers: dict[str, object] = {"partitions": [{"name": f"p{at}", "port": free_port()} for at in range(count)]}
    if count == 1:
        servers = {"port": free_port()}
    file = folder / f"{count}.yaml"
    file.write_text(json.dumps({**CLUSTER, "metadata_server": {**common, **servers}}))
    config = load_config(file)
    at = [["--at", address] for one in config.metadata_server.partitions for address in addresses_of(one)] or [[]]
    async with AsyncExitStack() as stack:
        command = [sys.executable, "-m", "metadata_server", "--config", str(file)]
        running = [await stack.enter_async_context(program([*command, *which], "() ready|(ready)")) for which in at]
        client = connect_client(endpoints_of(config.metadata_server), SystemClock())
        stack.push_async_callback(client.aclose)
        for request in registrations(2 * size * prompts):  # slices fill unevenly
            await registered(client, request)
        keys = [[ChunkKey(os.urandom(16)) for _ in range(size)] for _ in range(prompts)]
        spent = cpu_s(running)
        stored, stored_p99 = await rate(client, keys, store)
        store_cpu, spent = cpu_s(running) - spent, cpu_s(running)
        matched, matched_p99 = await rate(client, keys, match)
        of_a_key = 1e6 / (size * prompts)
        return {
            "reserve_commit_keys_per_s": stored,
            "reserve_commit_p99_ms": stored_p99,
            "reserve_commit_servers_us_a_key": store_cpu * of_a_key,
            "match_keys_per_s": matched,
            "match_p99_ms": matched_p99,
            "match_servers_us_a_key": (cpu_s(running) - spent) * of_a_key,
        }


def cpu_s(servers: list[Child]) -> float:
    return sum(server.cpu_s() for server in servers)


def free_port() -> int:
    with listen(HOST, 0) as bound:
        return int(bound.getsockname()[1])


def hashing_us(count: int) -> float:
    """For a key's partition among three, of `count` keys."""
    whole, keys = Partitions(("a", "b", "c")), [ChunkKey(os.urandom(16)) for _ in range(count)]
    whole.numbers_of(keys)
    began = perf_counter()
    whole.numbers_of(keys)
    return (perf_counter() - began) / count * 1e6


async def by_turns(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Medians over the rounds, of each number of partitions and each size of a prompt."""
    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for size in options.sizes:
            for count in options.partitions:
                for name, value in (await measure(count, size, options.prompts, folder)).items():
                    found.setdefault(f"{name}_{size}_of_{count}", []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """One table, one RESULT."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--partitions", type=int, nargs="+", default=[1, 2], help="metadata servers")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1000], help="chunks of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = {"key_to_partition_us": hashing_us(1_000_000), **uvloop.run(by_turns(options, Path(folder)))}
    print(f"{os.cpu_count()} cores, for the client and the servers together\n\n| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.2f} |")
    print("RESULT " + json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
