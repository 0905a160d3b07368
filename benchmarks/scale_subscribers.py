"""Subscribers for benchmarks.scale that take a snapshot at the same time and look at nothing but its frames' lengths.

`python -m benchmarks.scale_subscribers HOST PORT COUNT`. Says `taken (seconds bytes)`: until the last one had it all.
"""

import asyncio
import sys
import time

import msgspec
import uvloop

from metadata_server.messages import EventBatch

_SMALL = 4096


async def take(host: str, port: int) -> int:
    """The snapshot's bytes. Its end is a batch without events."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
    writer.write(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    size = 0
    while True:
        chunk = await reader.readexactly(int(await reader.readline(), 16) + 2)
        size += len(chunk)
        if len(chunk) < _SMALL and not msgspec.msgpack.decode(chunk[4:-2], type=EventBatch).events:
            writer.close()
            return size


async def run(host: str, port: int, count: int) -> None:
    """All at the same time."""
    began = time.perf_counter()
    sizes = await asyncio.gather(*(take(host, port) for _ in range(count)))
    print(f"taken {time.perf_counter() - began:.3f} {sum(sizes)}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
