"""Hand KV over through the whole store: reserve, write, commit, then match, read and verify, against memcpy.

A real metadata server and a real segment owner, each a process of its own; this process is writer and reader. Payloads
of 1 to 64 MiB in chunks of at most 8 MiB, each gathered from and scattered to four blocks.

Estimate for 64 MiB over shm: two copies at memcpy's 13 GB/s (10 ms) and two checksums at 35 GB/s (4 ms, partly beside
the copies) are 4.5 to 6 GB/s of payload per (put + get); over tcp each way costs a copy into and one out of the kernel.
Run: python -m benchmarks.handoff [--rounds 9]
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.children import child
from kvcore.clock import SystemClock
from kvcore.config.schema import TransportConfig
from kvcore.process.service import loop_factory
from kvcore.types import ChunkKey, KVSpec, NodeInfo, Role, Segment
from kvstore.chunk_format import checksum
from kvstore.store import KVStore
from kvstore.types import GetOutcome
from metadata_server.connect import MetadataEndpoints, connect_client
from metadata_server.messages import RegisterRequest, SegmentManifest
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import build_transfer, start_segment_hosts

SIZES_MIB = (1, 4, 16, 64)
CHUNK_MIB = 8
BLOCKS = 4
SEGMENT_BYTES = 512 << 20
CALL_S = 10.0
CONFIG = """
cluster: handoff
model: {path: none, name: none}
engine: {kind: sim}
nodes: {n0: {role: decoder, port: 8200}}
metadata_server: {port: 0, node_ttl_s: 600}
"""
PHASES = ("reserve", "write", "commit", "match", "read", "memcpy", "hash")


async def own_segment() -> None:
    """The segment owner's process: print the segment, serve it until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with SegmentMemory.create("n0.1", SEGMENT_BYTES) as memory:
        hosts = await start_segment_hosts(TransportConfig(), memory, host="127.0.0.1")
        segment = Segment(
            id="n0.1",
            node_id="n0",
            size_bytes=memory.size_bytes,
            host_id=host_identity(),
            addresses=hosts.addresses,
        )
        print("segment " + msgspec.json.encode(segment).decode(), flush=True)
        await stop.wait()
        await hosts.aclose()


class Payload:
    """Chunks to send and room to receive them, all faulted in."""

    def __init__(self, size_mib: int, blocks: int = BLOCKS) -> None:
        self.blocks = blocks
        self.num_bytes = size_mib << 20
        self.chunk_bytes = min(size_mib, CHUNK_MIB) << 20
        self.source = bytearray(os.urandom(self.num_bytes))
        self.target = bytearray(b"\x01" * self.num_bytes)

    def chunks(self, memory: bytearray) -> list[list[memoryview]]:
        """The memory as chunks of blocks."""
        view, step = memoryview(memory), self.chunk_bytes // self.blocks
        blocks = [view[at : at + step] for at in range(0, len(view), step)]
        return [blocks[at : at + self.blocks] for at in range(0, len(blocks), self.blocks)]

    def spec(self) -> KVSpec:
        """What the store needs to know."""
        return KVSpec(
            model_id="handoff",
            weights_digest="",
            tokenizer_digest="",
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            dtype="uint8",
            attention="",
            layout_id="handoff",
            chunk_tokens=1,
            chunk_bytes=self.chunk_bytes,
        )


async def one_round(store: KVStore, payload: Payload, number: int) -> dict[str, float]:
    """Seconds a phase. `memcpy` and `hash` go over the same bytes once, for comparison."""
    marks = [time.perf_counter()]
    source, target = payload.chunks(payload.source), payload.chunks(payload.target)
    keys = [ChunkKey((number << 32 | index).to_bytes(16, "big")) for index in range(len(source))]
    async with await store.begin_put(keys, prefer_segment="n0.1", timeout_s=CALL_S) as session:
        marks.append(time.perf_counter())
        async with asyncio.TaskGroup() as group:
            for key, chunk in zip(keys, source, strict=True):
                group.create_task(session.write(key, 1, chunk, timeout_s=CALL_S))
        marks.append(time.perf_counter())
        committed = await session.commit(timeout_s=CALL_S)
        marks.append(time.perf_counter())
    match = await store.match(keys, timeout_s=CALL_S)
    marks.append(time.perf_counter())
    result = await store.get_into(match, 0, target, timeout_s=CALL_S)
    marks.append(time.perf_counter())
    if committed != keys or result.outcomes != [GetOutcome.OK] * len(keys) or payload.source != payload.target:
        raise SystemExit(f"the handoff failed: {result.outcomes}, {store.counters()}")
    await store.release(match)
    marks.append(time.perf_counter())
    np.copyto(np.frombuffer(payload.target, np.uint8), np.frombuffer(payload.source, np.uint8))
    copied = time.perf_counter()
    checksum([memoryview(payload.source)])
    hashed = time.perf_counter()
    steps = [after - before for before, after in pairwise(marks)][:5]
    return dict(zip(PHASES, [*steps, copied - marks[-1], hashed - copied], strict=True))


async def measure(url: str, segment: Segment, rounds: int) -> dict[str, float]:
    """Print the table; returns the RESULT."""
    clock = SystemClock()
    client = connect_client(MetadataEndpoints(urls=(url,), timeout_s=CALL_S), clock)
    node = NodeInfo(id="n0", role=Role.STORE, control_url="http://127.0.0.1:1", incarnation=1)
    await client.register(RegisterRequest(node=node, segments=[SegmentManifest(segment=segment)], ttl_s=600))
    print(
        f"{'':<5}{'MiB':>4}"
        + "".join(f"{phase + ' ms':>12}" for phase in PHASES)
        + f"{'put+get GB/s':>14}{'/memcpy':>9}"
    )
    result: dict[str, float] = {}
    memcpy: list[float] = []
    for at, transport in enumerate((TransportConfig(kind="shm"), TransportConfig(kind="tcp"))):
        transfer, kind = build_transfer(transport, segment.host_id), transport.kind
        for size_mib in SIZES_MIB:
            payload = Payload(size_mib)
            store = KVStore(
                spec=payload.spec(), node_id="n0", incarnation=1, metadata=client, transfer=transfer, clock=clock
            )
            base = (at * 64 + size_mib) << 16
            taken = [await one_round(store, payload, base + index) for index in range(rounds + 1)][1:]
            await store.aclose()
            median = {phase: statistics.median(one[phase] for one in taken) for phase in PHASES}
            through = statistics.median(sum(list(one.values())[:5]) for one in taken)
            gbps = payload.num_bytes / through / 1e9
            ratio = gbps / (payload.num_bytes / median["memcpy"] / 1e9)
            row = "".join(f"{median[phase] * 1e3:>12.3f}" for phase in PHASES)
            print(f"{kind:<5}{size_mib:>4}{row}{gbps:>14.2f}{ratio:>9.2f}", flush=True)
            if size_mib == SIZES_MIB[-1]:
                memcpy += [payload.num_bytes / one["memcpy"] / 1e9 for one in taken]
                result[f"{kind}_put_get_gbps"] = round(gbps, 3)
        await transfer.aclose()
    await client.aclose()
    return {"memcpy_gbps": round(statistics.median(memcpy), 3), **result}


async def run(rounds: int) -> None:
    """Bring up the two processes, measure, print RESULT."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "cluster.yaml"
        config.write_text(CONFIG)
        async with (
            child(["-m", "metadata_server", "--config", str(config)], r"url=\"?(http://[^\s\"]+)") as server,
            child(["-m", "benchmarks.handoff", "--own-segment"], r"^segment (.*)") as owner,
        ):
            result = await measure(server.said, msgspec.json.decode(owner.said, type=Segment), rounds)
    print("RESULT " + json.dumps(result))


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--own-segment", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:  # the loop that engines have
        runner.run(own_segment() if arguments.own_segment else run(arguments.rounds))


if __name__ == "__main__":
    main()
