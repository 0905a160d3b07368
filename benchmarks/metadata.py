"""The metadata server under load: chunks matched, reserved and committed a second over sockets, their latency, and the
memory of a chunk; with `/metadata` of `benchmarks.metadata_dialect` beside Mooncake's own servers.

`python -m benchmarks.metadata [--chunks 1000000] [--prompts 4000] [--sizes 1 64 1000] [--no-dialect]`. Sixteen
connections with one request each, prompts of 1, 64 and 1,000 chunks, beside `batch_is_exist` of mooncake_master; the
server is a process of its own and its segments are never full.
"""

import argparse
import asyncio
import gc
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter

import msgspec
import uvloop

from benchmarks.children import Child, program, scratch_folder
from benchmarks.metadata_dialect import measure_dialect
from benchmarks.metadata_mooncake import measure_mooncake
from kvcore.config.schema import StoreConfig
from kvcore.ports import listen
from kvcore.types import ChunkKey, NodeInfo, Role, Segment
from metadata_server.index.state import MetadataState
from metadata_server.messages import (
    MatchRequest,
    RegisterRequest,
    ReplicaIds,
    ReserveItem,
    ReserveReply,
    ReserveRequest,
    SegmentManifest,
)

HOST, BATCH, CONNECTIONS, CHUNK_BYTES = "127.0.0.1", 64, 16, 65_536
NODES = [f"n{number}" for number in range(4)]
CLUSTER = {
    "cluster": "bench",
    "model": {"path": "sim", "name": "sim"},
    "engine": {"kind": "sim"},
    "nodes": {"p": {"role": "prefiller", "port": 1}, "d": {"role": "decoder", "port": 2}},
}
_decode = msgspec.msgpack.Decoder(ReserveReply).decode
Prompt = list[ChunkKey]


class Caller:
    """One connection with one request under way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def call(self, path: str, request: object) -> bytes:
        """The reply's body."""
        body = msgspec.msgpack.encode(request)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/msgpack\r\nContent-Length: {len(body)}\r\n"
        )
        self._writer.write(head.encode() + b"\r\n" + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode(errors="replace"))
        return await self._reader.readexactly(int(answer.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))


def registrations(chunks: int) -> Iterator[RegisterRequest]:
    """Nodes with room for so many chunks, and some to spare."""
    size = (chunks // len(NODES) + 1000) * 2 * CHUNK_BYTES
    for name in NODES:
        node = NodeInfo(id=name, role=Role.STORE, control_url=f"http://{name}", incarnation=1)
        segment = Segment(id=f"{name}.1", node_id=name, size_bytes=size, host_id="h", addresses={"tcp": "x"})
        yield RegisterRequest(node=node, segments=[SegmentManifest(segment=segment)], ttl_s=3600)


def reservation(number: int, keys: Prompt) -> ReserveRequest:
    items = [ReserveItem(key=key, length=CHUNK_BYTES) for key in keys]
    name = NODES[number % len(NODES)]
    return ReserveRequest(node_id=name, incarnation=1, items=items, prefer_segment=f"{name}.1", ttl_s=60, in_order=True)


async def store(caller: Caller, number: int, keys: Prompt) -> None:
    """Reserve and commit one prompt."""
    reply = _decode(await caller.call("/v1/objects/reserve", reservation(number, keys)))
    ids = [outcome.replica.id for outcome in reply.outcomes if outcome.replica is not None]
    assert len(ids) == len(keys), "room ran out"
    request = ReplicaIds(node_id=NODES[number % len(NODES)], incarnation=1, replica_ids=ids)
    await caller.call("/v1/objects/commit", request)


async def match(caller: Caller, _: int, keys: Prompt) -> None:
    """Ask for one prompt."""
    await caller.call("/v1/objects/match", MatchRequest(keys=keys, in_order=True))


async def as_fast_as_it_goes(
    callers: list[Caller], prompts: list[Prompt], one: Callable[[Caller, int, Prompt], Awaitable[None]]
) -> tuple[float, float]:
    """Keys a second, and the 99th percentile of `one` in ms."""
    work, took = iter(enumerate(prompts)), list[float]()

    async def run(caller: Caller) -> None:
        for number, keys in work:
            began = perf_counter()
            await one(caller, number, keys)
            took.append(perf_counter() - began)

    started = perf_counter()
    await asyncio.gather(*map(run, callers))
    seconds = perf_counter() - started
    return sum(map(len, prompts)) / seconds, sorted(took)[int(len(took) * 0.99)] * 1e3


async def at_a_rate(callers: list[Caller], prompts: list[Prompt], per_second: int, seconds: float) -> float:
    """99th percentile in ms of matches that begin at fixed times, their time in the queue included."""
    took, start = list[float](), perf_counter()

    async def run(first: int, caller: Caller) -> None:
        for number in range(first, int(per_second * seconds), len(callers)):
            due = start + number / per_second
            await asyncio.sleep(max(0.0, due - perf_counter()))
            await match(caller, number, prompts[number % len(prompts)])
            took.append(perf_counter() - due)

    await asyncio.gather(*(run(first, caller) for first, caller in enumerate(callers)))
    return sorted(took)[int(len(took) * 0.99)] * 1e3


async def over_sockets(count: int, sizes: list[int]) -> dict[str, float]:
    """Rates and latencies of a server of its own: `count` prompts of BATCH chunks, and as many chunks in prompts of the
    other `sizes`, but no more prompts."""
    with listen(HOST, 0) as bound:
        port = int(bound.getsockname()[1])
    counts = {size: min(count, count * BATCH // size) for size in sizes}
    found = dict[str, float]()
    with scratch_folder() as folder:
        records = {"kind": "sqlite", "path": f"{folder}/records.sqlite"}
        # The nodes are only registered: without heartbeats they would be dropped, chunks and all, while it is measured.
        server = {"host": HOST, "port": port, "records": records, "node_ttl_s": 3600.0}
        config = written(Path(folder, "cluster.yaml"), {**CLUSTER, "metadata_server": server})
        async with program([sys.executable, "-m", "metadata_server", "--config", config], "() ready|(ready)") as child:
            callers = [Caller(*await asyncio.open_connection(HOST, port)) for _ in range(CONNECTIONS)]
            for request in registrations(sum(size * prompts for size, prompts in counts.items())):
                await callers[0].call("/v1/nodes/register", request)
            for size, prompts in counts.items():
                found |= await one_size(callers, size, prompts, child)
    return found


async def one_size(callers: list[Caller], size: int, count: int, server: Child) -> dict[str, float]:
    """Of so many prompts of so many chunks; the server's processor time besides. Names of BATCH have no size."""
    prompts = [[ChunkKey(os.urandom(16)) for _ in range(size)] for _ in range(count)]
    ending, keys = "" if size == BATCH else f"_{size}", size * count
    spent = server.cpu_s()
    stored, stored_p99 = await as_fast_as_it_goes(callers, prompts, store)
    store_cpu, spent = server.cpu_s() - spent, server.cpu_s()
    matched, matched_p99 = await as_fast_as_it_goes(callers, prompts, match)
    found = {
        "match_keys_per_s": matched,
        "match_p99_ms": matched_p99,
        "match_server_us_a_key": (server.cpu_s() - spent) / keys * 1e6,
        "reserve_commit_keys_per_s": stored,
        "reserve_commit_p99_ms": stored_p99,
        "reserve_commit_server_us_a_key": store_cpu / keys * 1e6,
    }
    if size == BATCH:
        found["p99_ms_at_1000"] = await at_a_rate(callers, prompts, 1000, 3.0)
    return {name + ending: value for name, value in found.items()}


def memory(chunks: int) -> dict[str, float]:
    """Of the index alone: bytes a chunk, keys included, and the longest a full collection stops the process."""
    state = MetadataState(StoreConfig(), 3600.0, "e", 1 << 40, event_log=16)
    gc.collect()
    gc.freeze()  # as a server does before it serves
    for request in registrations(chunks):
        state.register(request, 0.0)
    before = resident()
    for number in range(chunks // BATCH):
        reply = state.reserve(reservation(number, [ChunkKey(os.urandom(16)) for _ in range(BATCH)]), 0.0)
        ids = [outcome.replica.id for outcome in reply.outcomes if outcome.replica is not None]
        node_id = NODES[number % len(NODES)]
        state.commit(ReplicaIds(node_id=node_id, incarnation=1, replica_ids=ids), 0.0)
    used, started = resident() - before, perf_counter()
    gc.collect()
    return {"bytes_per_chunk": used / state.num_objects, "gc_pause_ms": (perf_counter() - started) * 1e3}


def written(path: Path, config: dict[str, object]) -> str:
    path.write_text(json.dumps(config))
    return str(path)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """One table, one RESULT."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--chunks", type=int, default=1_000_000, help="for the memory of a chunk")
    parser.add_argument("--prompts", type=int, default=4000, help="of 64 chunks each, over sockets")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 64, 1000], help="chunks of a prompt")
    parser.add_argument("--no-dialect", action="store_true", help="without /metadata and Mooncake")
    options = parser.parse_args()
    found = memory(options.chunks)
    found |= uvloop.run(over_sockets(options.prompts, options.sizes))
    if not options.no_dialect:
        found |= uvloop.run(measure_mooncake(options.sizes))
        found |= uvloop.run(measure_dialect())
    print("| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.2f} |")
    print("RESULT " + json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
