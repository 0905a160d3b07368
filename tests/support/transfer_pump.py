"""A process that writes to and reads from a segment without end, to be killed: `python -m support.transfer_pump`."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from support.transports import transport_config

from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.memory.segment import host_identity
from transfer.select import build_transfer


@contextlib.asynccontextmanager
async def pump_process(segment: Segment, kind: str) -> AsyncIterator["asyncio.subprocess.Process"]:
    """A process in the middle of writing to and reading from `segment`; ended at the latest with the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "support.transfer_pump",
        msgspec.json.encode(segment).decode(),
        kind,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"moving\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _pump(segment: Segment, kind: str) -> None:
    engine = build_transfer(transport_config(kind), host_identity())
    data = memoryview(bytearray(segment.size_bytes))
    small = [TransferOp(segment, at, [data[at : at + 4096]]) for at in range(0, len(data), 8192)]
    while True:
        for ops in ([TransferOp(segment, 0, [data])], small):
            if any([*await engine.write(ops, 10), *await engine.read(ops, 10)]):
                return
        sys.stdout.write("moving\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_pump(msgspec.json.decode(sys.argv[1], type=Segment), sys.argv[2]))
