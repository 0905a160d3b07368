"""How the metadata server bears growth: restarts with many nodes, millions of chunks, many subscribers, deaths.

`python -m benchmarks.scale [--nodes 20 60] [--chunks 65536] [--subscribers 8 64] [--objects 1000000 5000000]`: at most
six minutes on two cores, and 4 GB. Nodes are simulated, but speak the nodes' own protocol to a server's process, which
is killed with -9 and started again; another process asks for /v1/stats all the time. "Before" are the figures that led
to this (3d2c13c, two cores, other work beside).
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import uvloop

from benchmarks.children import Child, child, program, scratch_folder
from benchmarks.metadata import CLUSTER, written
from benchmarks.scale_alone import Found, alone, crowd, routers
from kvcore.clock import SystemClock
from kvcore.ports import listen
from metadata_server.account_messages import Stats
from metadata_server.connect import MetadataEndpoints, connect_subscription
from metadata_server.messages import Event, EventKind
from router.routing.index import PrefixIndex

HOST = "127.0.0.1"
_BEFORE = {
    "restart, 20 nodes, s": "9.8",
    "restart, 60 nodes, s": "34.9",
    "longest /v1/stats, restart of 20, s": "2.4",
    "longest /v1/stats, restart of 60, s": "18.9",
    "live nodes expired, restart of 60": "6",
    "longest /v1/stats, 8 snapshots, s": "28.6 (4M chunks)",
    "a full collection at 5M chunks, s": "2.5",
    "bytes a chunk at 5M chunks": "690 to 810",
    "the router's index, 1 death, s": "1.4",
    "the router's index, 10 deaths, s": "11.6",
}


class Poller:
    """Asks for /v1/stats, again and again: how long the longest answer took, and the latest one."""

    def __init__(self, port: int) -> None:
        self.longest_s = 0.0
        self.stats: Stats | None = None
        self._port = port

    async def run(self) -> None:
        """Until cancelled; waits for a server that is not there."""
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(HOST, self._port)
                try:
                    await self._ask(reader, writer)
                finally:
                    writer.close()
            self.stats = None
            await asyncio.sleep(0.02)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            began = time.perf_counter()
            writer.write(b"GET /v1/stats HTTP/1.1\r\nHost: x\r\nAccept: application/msgpack\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            self.stats = msgspec.msgpack.decode(body, type=Stats)
            await asyncio.sleep(0.01)


class TimedIndex:
    """The router's index as a sink of events, and how long the longest change of it took."""

    def __init__(self) -> None:
        self.index, self.longest_s, self.downs = PrefixIndex(), 0.0, 0

    def on_reset(self) -> None:
        """See IndexSink."""
        self.index.reset()

    async def sweep(self) -> None:
        """All of it, as later changes do step by step."""
        for _ in range(600):
            began = time.perf_counter()
            self.index.sweep()
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            await asyncio.sleep(0)

    def on_events(self, events: list[Event]) -> None:
        """See IndexSink."""
        for event in events:
            began = time.perf_counter()
            if event.kind is EventKind.STORED:
                self.index.store(event.node_id, event.keys, event.segment_id)
            elif event.kind is EventKind.REMOVED:
                self.index.remove(event.node_id, event.keys, event.segment_id)
            elif event.kind is EventKind.NODE_DOWN:
                self.index.drop_node(event.node_id)
                self.downs += 1
            self.longest_s = max(self.longest_s, time.perf_counter() - began)


@asynccontextmanager
async def server(folder: str, port: int) -> AsyncIterator[Child]:
    """A metadata server's process."""
    records = {"kind": "sqlite", "path": f"{folder}/records.sqlite"}
    config = written(
        Path(folder, "cluster.yaml"), {**CLUSTER, "metadata_server": {"host": HOST, "port": port, "records": records}}
    )
    command = [sys.executable, "-m", "metadata_server", "--config", config]
    async with program(command, "() ready|(ready)") as process:
        yield process


async def until_all_is_known(poller: Poller, nodes: int, chunks: int) -> None:
    async with asyncio.timeout(150):
        while True:
            stats = poller.stats
            if stats is not None and len(stats.nodes) == nodes and not stats.rebuilding and stats.objects >= chunks:
                return
            await asyncio.sleep(0.005)


async def restart(nodes: int, chunks: int, subscribers: list[int], deaths: list[int], *, last: bool) -> Found:
    """A server that is killed and started again under so many nodes; with `last`, what comes after that, too."""
    found: Found = {}
    with listen(HOST, 0) as bound:
        port = int(bound.getsockname()[1])
    with scratch_folder() as folder:
        poller = Poller(port)
        polling = asyncio.create_task(poller.run())
        try:
            async with server(folder, port) as before:
                url = f"http://{HOST}:{port}"
                simulated = child(
                    ["-m", "benchmarks.scale_nodes", url, str(nodes), str(chunks)], "ready (.*)", within_s=90
                )
                async with simulated as crowd:
                    os.kill(before.pid, signal.SIGKILL)
                    began, poller.longest_s = time.perf_counter(), 0.0
                    async with server(folder, port) as after:
                        await until_all_is_known(poller, nodes, nodes * chunks)
                        found[f"restart, {nodes} nodes, s"] = time.perf_counter() - began
                        found[f"the server's processor time of it, {nodes} nodes, s"] = after.cpu_s()
                        found[f"longest /v1/stats, restart of {nodes}, s"] = poller.longest_s
                        expired = poller.stats.counters.get("nodes_expired", 0) if poller.stats else 0
                        found[f"live nodes expired, restart of {nodes}"] = expired
                        if last:
                            await snapshots(poller, port, subscribers, found)
                            await die(poller, port, crowd, deaths, found)
        finally:
            polling.cancel()
    return found


async def snapshots(poller: Poller, port: int, subscribers: list[int], found: Found) -> None:
    """So many subscribers ask for everything at the same time."""
    for count in subscribers:
        poller.longest_s = 0.0
        command = ["-m", "benchmarks.scale_subscribers", HOST, str(port), str(count)]
        async with child(command, "taken (.*)", within_s=150) as taken:
            seconds, size = map(float, taken.said.split())
        found[f"{count} snapshots at once, s"] = seconds
        found[f"{count} snapshots at once, MB"] = size / 1e6
        found[f"longest /v1/stats, {count} snapshots, s"] = poller.longest_s


async def die(poller: Poller, port: int, crowd: Child, deaths: list[int], found: Found) -> None:
    """Nodes fall silent: their leases end, and a router's index hears of it."""
    sink = TimedIndex()
    endpoints = MetadataEndpoints(urls=(f"http://{HOST}:{port}",), timeout_s=2.0)
    following = connect_subscription(endpoints, lambda _: sink, SystemClock())
    task = asyncio.create_task(following.run())
    while not following.connected:  # noqa: ASYNC110 - nobody says so
        await asyncio.sleep(0.01)
    gc.collect()
    gc.freeze()
    for wanted in deaths:
        count = min(wanted, len(poller.stats.nodes) if poller.stats else 0)
        poller.longest_s = sink.longest_s = sink.downs = 0
        os.kill(crowd.pid, signal.SIGUSR1 if wanted == 1 else signal.SIGUSR2)
        async with asyncio.timeout(30):
            while sink.downs < count:  # noqa: ASYNC110 - nobody says so
                await asyncio.sleep(0.002)
            await sink.sweep()
            await asyncio.sleep(1.5)  # what is left at the server goes in slices
        found[f"longest /v1/stats, {count} death{'s' * (count > 1)}, s"] = poller.longest_s
        found[f"the router's index, {count} death{'s' * (count > 1)}, s"] = sink.longest_s
    task.cancel()
    await asyncio.wait({task})
    await following.aclose()


async def measure(
    nodes: list[int],
    chunks: int,
    *,
    subscribers: list[int],
    deaths: list[int],
    objects: list[int],
    show: Callable[[Found], None] = lambda _: None,
) -> Found:
    """All of it; under the last of `nodes` come subscribers and deaths, too. `show`: takes what there is so far."""
    found = crowd(10_000) | routers(max(objects) // 5, 60) | routers(max(objects) // 5, 1000) | alone(objects)
    gc.unfreeze()
    gc.collect()
    show(found)
    for count in nodes:
        more = await restart(count, chunks, subscribers, deaths, last=count == nodes[-1])
        show(more)
        found |= more
    return found


def result(found: Found, nodes: int) -> Found:
    """What is compared over time. Seconds, and a count."""
    longest = [value for name, value in found.items() if name.startswith("longest /v1/stats,")]
    deaths = [value for name, value in found.items() if "death" in name]
    return {
        f"restart_{nodes}_nodes_s": found[f"restart, {nodes} nodes, s"],
        "longest_stats_s": max(longest),
        "wrongly_expired": found[f"live nodes expired, restart of {nodes}"],
        "gc_pause_s": max(value for name, value in found.items() if "collection" in name),
        "node_down_pause_s": max(deaths),
    }


def show(found: Found) -> None:
    """Rows of the table."""
    for name, value in found.items():
        print(f"| {name} | {_BEFORE.get(name, '')} | {value:,.4f} |", flush=True)


def main() -> None:
    """One table, one RESULT."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--nodes", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--chunks", type=int, default=65_536, help="a node")
    parser.add_argument("--subscribers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--objects", type=int, nargs="+", default=[1_000_000, 2_000_000, 5_000_000])
    options = parser.parse_args()
    print("| | before | now |\n|---|---|---|")
    all_of_it = measure(
        options.nodes,
        options.chunks,
        subscribers=options.subscribers,
        deaths=[1, 10],
        objects=options.objects,
        show=show,
    )
    found = uvloop.run(all_of_it)
    print("RESULT " + json.dumps({name: round(value, 4) for name, value in result(found, options.nodes[-1]).items()}))


if __name__ == "__main__":
    main()
