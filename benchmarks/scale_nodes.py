"""Simulated nodes for benchmarks.scale: they speak the nodes' own protocol, with a manifest in place of a segment.

`python -m benchmarks.scale_nodes URL NODES CHUNKS`. Says `ready (N)` when all have registered. SIGUSR1 ends one of them
as a death would, SIGUSR2 ten: they are silent from then on.
"""

import asyncio
import gc
import itertools
import os
import signal
import sys

import uvloop

from kvcore.clock import SystemClock
from kvcore.types import ChunkKey, NodeInfo, Role, Segment
from kvnode.membership import Membership
from metadata_server.connect import MetadataEndpoints, connect_client
from metadata_server.messages import ManifestEntry, SegmentManifest

CHUNK_BYTES = 65_536


def manifest(name: str, chunks: int) -> SegmentManifest:
    """A segment that is nine tenths full, its newest chunks first."""
    segment = Segment(
        id=f"{name}.1", node_id=name, size_bytes=chunks * 10 // 9 * CHUNK_BYTES, host_id="h", addresses={"tcp": "x"}
    )
    keys = os.urandom(16 * chunks)
    entries = [
        ManifestEntry(
            key=ChunkKey(keys[16 * at : 16 * at + 16]), offset=at * CHUNK_BYTES, length=CHUNK_BYTES, generation=at + 1
        )
        for at in range(chunks - 1, -1, -1)
    ]
    return SegmentManifest(segment=segment, entries=entries)


async def run(url: str, count: int, chunks: int) -> None:
    """Until killed."""
    endpoints, clock, loop = MetadataEndpoints(urls=(url,), timeout_s=2.0), SystemClock(), asyncio.get_running_loop()
    members, tasks = [], []
    for name in map("n{}".format, range(count)):
        told = manifest(name, chunks)
        info = NodeInfo(id=name, role=Role.STORE, control_url=f"http://{name}", incarnation=1)

        async def scan(told: SegmentManifest = told) -> list[SegmentManifest]:
            return [told]

        segments = [told.segment]
        members.append(Membership(connect_client(endpoints, clock), info, segments.copy, scan, ttl_s=5.0))
    gc.collect()
    gc.freeze()
    tasks = [asyncio.create_task(member.run()) for member in members]
    alive = iter(tasks)

    def die(number: int) -> None:
        for task in itertools.islice(alive, number):
            task.cancel()

    loop.add_signal_handler(signal.SIGUSR1, die, 1)
    loop.add_signal_handler(signal.SIGUSR2, die, 10)
    while not all(member.joined for member in members):  # noqa: ASYNC110 - nobody says so
        await asyncio.sleep(0.05)
    print(f"ready {count}", flush=True)
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
