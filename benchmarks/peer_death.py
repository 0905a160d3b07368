"""How long after a peer was killed do the batches on it end with an error? Each transport, over loopback.

A segment's owner is a process of its own. Batches of 64 MiB, a put and a get at a time without pause, and one of 4 KiB;
at a random moment the owner gets SIGKILL, and the clock runs until the last of them has said so.

Estimate: TCP and UCX over it see the reset within a millisecond, then hand the error from thread to loop; shm looks at
the owner after each batch, so a copy under way (15 ms) ends first; NIXL is looked at every few milliseconds. RDMA would
take longer: the HCA retries for some seconds. Wanted: 100 ms.
Run: python -m benchmarks.peer_death [--deaths 20] [--kinds shm,tcp,ucx,nixl]
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time

import msgspec

from benchmarks.children import Child, program
from benchmarks.transfer_worker import KINDS, transport_config
from kvcore.errors import ConfigError, TransferError
from kvcore.process.service import loop_factory
from kvcore.types import Segment
from transfer.base import TransferEngine, TransferOp
from transfer.memory.segment import host_identity
from transfer.select import build_transfer

SIZES = (64 << 20, 64 << 20, 4 << 10)
DEVICE = "lo"
DEADLINE_S = 20.0
LONGEST_LIFE_S = 0.3


async def _pump(engine: TransferEngine, segment: Segment, size: int, way: str) -> TransferError:
    """Move bytes until that fails."""
    memory = memoryview(bytearray(size))
    move = engine.write if way == "put" else engine.read
    while True:
        (error,) = await move([TransferOp(segment, 0, [memory])], DEADLINE_S)
        if error is not None:
            return error
        await asyncio.sleep(0)


async def one_death(kind: str, dice: random.Random) -> float:
    """Seconds from the kill to the last batch's error. Raises ConfigError where the transport is not to be had."""
    engine = build_transfer(transport_config(kind, DEVICE), host_identity())
    owner = [sys.executable, "-m", "benchmarks.transfer_worker", "--own", str(max(SIZES)), "--device", DEVICE]
    try:
        async with program(owner, r"^segment (.*)") as child:
            return await _killed(engine, child, dice)
    finally:
        await engine.aclose()


async def _killed(engine: TransferEngine, child: Child, dice: random.Random) -> float:
    segment = msgspec.json.decode(child.said, type=Segment)
    ways = ("put", "get", dice.choice(("put", "get")))
    async with asyncio.TaskGroup() as tasks:
        pumps = [tasks.create_task(_pump(engine, segment, size, way)) for size, way in zip(SIZES, ways, strict=True)]
        await asyncio.sleep(dice.uniform(0.1, LONGEST_LIFE_S))
        assert not any(pump.done() for pump in pumps), [pump.result() for pump in pumps if pump.done()]
        os.kill(child.pid, signal.SIGKILL)
        began = time.perf_counter()
        await asyncio.wait(pumps)
        return time.perf_counter() - began


async def run(kinds: list[str], deaths: int) -> None:
    """All transports in turns; the table and the RESULT."""
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(deaths):
        for kind in list(taken):
            try:
                taken[kind].append(await one_death(kind, random.Random(number)))
            except ConfigError as error:
                del taken[kind]
                print(f"{kind:<8}not run: {error.message}")
    print(f"{'':<8}{'p50 ms':>10}{'longest':>10}")
    for kind, seconds in taken.items():
        print(f"{kind:<8}{statistics.median(seconds) * 1e3:>10.1f}{max(seconds) * 1e3:>10.1f}")
    figures = {
        f"{kind}_{name}_ms": round(value * 1e3, 1)
        for kind, seconds in taken.items()
        for name, value in (("p50", statistics.median(seconds)), ("max", max(seconds)))
    }
    print("RESULT " + json.dumps({"deaths": deaths, **figures}))


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(KINDS))
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run(arguments.kinds.split(","), arguments.deaths))


if __name__ == "__main__":
    main()
