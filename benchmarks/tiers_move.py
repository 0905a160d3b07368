"""Moves bytes between memory and one tier, for benchmarks.tiers: answers each line of stdin with a line of JSON.

`python -m benchmarks.tiers_move 'redis={url: redis://127.0.0.1:6379}'`: the tier as a node opens it, from its section
of a cluster file. Each answer has the seconds and the processor's seconds of saving and of loading NUM_CHUNKS chunks of
CHUNK_BYTES, and of what they are held against: a copy of as many bytes, and for a disk reads of a plain file beside the
tier's. What is loaded is compared with what was saved, the first time.
"""

import argparse
import asyncio
import json
import mmap
import os
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from benchmarks.children import cpu_s_with_children
from kvcore.clock import SystemClock
from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.config.tiers import DiskTierConfig
from kvcore.process.service import loop_factory
from kvcore.types import ChunkKey
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack
from kvstore.tiers.base import ChunkName, Tier, TierChunk, TierOutcome
from kvstore.tiers.opening import TierPlace, configured, open_tier

NUM_CHUNKS = 32
CHUNK_BYTES = 4 << 20
"""Header and payload; 64 to 256 tokens of models of 16 to 64 KiB a token."""
CALL_S = 60.0
_FINGERPRINT = bytes(range(16))
_TOTAL = NUM_CHUNKS * CHUNK_BYTES


class Mover:
    """Two halves of a segment, one saved from, the other loaded into."""

    def __init__(self, tier: Tier, segment: memoryview) -> None:
        self._tier, self._from, self._into = tier, segment[:_TOTAL], segment[_TOTAL:]
        self._life = os.urandom(4)
        self._round = 0
        for start in range(0, _TOTAL, CHUNK_BYTES):
            self._from[start : start + CHUNK_BYTES] = os.urandom(CHUNK_BYTES)
        self._into[:] = bytes(_TOTAL)

    async def once(self) -> dict[str, float]:
        """Save chunks that the tier does not have, load them, and copy as many bytes."""
        self._round += 1
        self._name_all()
        found = {}
        for what, memory in (("save", self._from), ("load", self._into)):
            chunks = self._chunks(memory)
            move: Callable[[], Awaitable[list[TierOutcome]]] = lambda: self._tier.load(chunks, timeout_s=CALL_S)  # noqa: B023, E731
            if what == "save":
                move = lambda: self._tier.save(chunks, timeout_s=CALL_S)  # noqa: B023, E731
            cpu, began = cpu_s_with_children(), time.perf_counter()
            outcomes = await move()
            found |= {f"{what}_s": time.perf_counter() - began, f"{what}_cpu_s": cpu_s_with_children() - cpu}
            if outcomes != [TierOutcome.OK] * NUM_CHUNKS:
                raise RuntimeError(f"{what}: {[str(outcome) for outcome in outcomes]}: {self._tier.stats().problem}")
        if self._round == 1 and self._into != self._from:
            raise RuntimeError("what was loaded is not what was saved")
        cpu, began = time.process_time(), time.perf_counter()
        self._into[:] = self._from
        return found | {"copy_s": time.perf_counter() - began, "copy_cpu_s": time.process_time() - cpu}

    async def forget(self) -> None:
        """Make room for the next round."""
        await self._tier.remove([chunk.name for chunk in self._chunks(self._from)], timeout_s=CALL_S)

    def _chunks(self, memory: memoryview) -> list[TierChunk]:
        views = [memory[start : start + CHUNK_BYTES] for start in range(0, _TOTAL, CHUNK_BYTES)]
        return [TierChunk(self._name(at), (view,)) for at, view in enumerate(views)]

    def _name(self, number: int) -> ChunkName:
        return ChunkName(_FINGERPRINT, ChunkKey(self._life + bytes([self._round, number] * 6)))

    def _name_all(self) -> None:
        """Give each chunk in memory this round's name."""
        for chunk in self._chunks(self._from):
            [view] = chunk.memory
            header = ChunkHeader(
                key=chunk.name.key,
                fingerprint=_FINGERPRINT,
                token_count=64,
                payload_length=CHUNK_BYTES - HEADER_BYTES,
                checksum=checksum([view[HEADER_BYTES:]]),
                generation=1,
            )
            view[:HEADER_BYTES] = pack(header)


class Device:
    """A plain file of as many bytes beside a tier's, read past the page cache in reads of a chunk's size."""

    def __init__(self, folder: Path, data: memoryview, threads: int = 2) -> None:
        self._threads = threads
        self._fd = os.open(folder / "device.bin", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        for start in range(0, _TOTAL, CHUNK_BYTES):
            os.pwritev(self._fd, [data[start : start + CHUNK_BYTES]], start)

    def read(self, into: memoryview) -> dict[str, float]:
        """Seconds and processor's seconds."""

        def read(start: int) -> int:
            return os.preadv(self._fd, [into[start : start + CHUNK_BYTES]], start)

        began, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(self._threads) as pool:
            if sum(pool.map(read, range(0, _TOTAL, CHUNK_BYTES))) != _TOTAL:
                raise RuntimeError("the file is too short")
        return {"device_s": time.perf_counter() - began, "device_cpu_s": time.process_time() - cpu}


def config_of(section: str) -> ClusterConfig:
    """A cluster with one node and the tier of `KIND={...}`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "moving.yaml"
        node = {"mover": {"role": "decoder", "port": 8200, "segment": "1GiB"}}
        model = {"path": "sim", "name": "sim"}
        file.write_text(yaml.safe_dump({"cluster": "moving", "model": model, "engine": {"kind": "sim"}, "nodes": node}))
        return load_config(file, [f"tiers.{section}"])


async def serve(section: str, host: str) -> None:
    """Answer lines until stdin ends."""
    loop, view = asyncio.get_running_loop(), memoryview(mmap.mmap(-1, 2 * _TOTAL))
    [config] = configured(config_of(section), "mover")
    tier = await open_tier(config, TierPlace("moving", "mover", host, view), SystemClock())
    try:
        mover = Mover(tier, view)
        device = Device(Path(config.path), view[:_TOTAL]) if isinstance(config, DiskTierConfig) else None
        print("ready", flush=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            found = await mover.once()
            if device is not None:
                found |= await asyncio.to_thread(device.read, view[_TOTAL:])
            print(json.dumps(found), flush=True)
            await mover.forget()
    finally:
        await tier.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", help="KIND={KEY: VALUE, ...}, as in `tiers` of a cluster file")
    parser.add_argument("--host", default=socket.gethostname())
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(options.section, options.host))


if __name__ == "__main__":
    main()
