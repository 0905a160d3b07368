"""A process that writes to or reads from a segment without end, to be killed: `python -m support.ucx_child`."""

import asyncio
import sys

import msgspec

from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.memory import host_identity
from transfer.select import build_transfer

from .transfer_rigs import transport_config


async def _pump(segment: Segment) -> None:
    engine = build_transfer(transport_config("ucx"), host_identity())
    data = memoryview(bytearray(segment.size_bytes))
    small = [TransferOp(segment, at, [data[at : at + 4096]]) for at in range(0, len(data), 8192)]
    while True:
        for ops in ([TransferOp(segment, 0, [data])], small):
            if any([*await engine.write(ops, 10), *await engine.read(ops, 10)]):
                return
        sys.stdout.write("moving\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_pump(msgspec.json.decode(sys.argv[1], type=Segment)))
