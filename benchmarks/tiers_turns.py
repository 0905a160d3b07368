"""Moving bytes to and from each tier by turns, for benchmarks.tiers: the children, and what their answers come to."""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.tiers_move import CHUNK_BYTES, NUM_CHUNKS
from benchmarks.tiers_servers import Servers

GIGABYTES = NUM_CHUNKS * CHUNK_BYTES / 1e9
ANSWER_S = 120.0


class Turns:
    """A child that moves when it is asked to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.answers: list[dict[str, float]] = []

    async def once(self) -> None:
        """One turn more. RuntimeError if the child has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self.answers.append(json.loads(await self.line()))

    async def line(self) -> str:
        """What it says next."""
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_S):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("a child that moves bytes has ended")
        return line.decode()

    def median(self, name: str) -> float:
        """Of all its turns but the first, which meets fresh memory."""
        return statistics.median(answer[name] for answer in self.answers[1:])


@asynccontextmanager
async def child(command: Sequence[str]) -> AsyncIterator[Turns]:
    """Once it is ready; it ends with the context."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    turns = Turns(process)
    try:
        while await turns.line() != "ready\n":
            pass
        yield turns
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(ANSWER_S):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def cpu_of(found: Servers, kind: str) -> float:
    """Processor seconds so far of the server behind a tier, its threads that have ended too; 0 where there is none."""
    if kind not in found.processes:
        return 0.0
    fields = Path(f"/proc/{found.processes[kind].pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def move_all(found: Servers, options: argparse.Namespace) -> dict[str, Any]:
    """Kind -> its rates; and the ratios that are wanted."""
    commands = {
        kind: [sys.executable, "-m", "benchmarks.tiers_move", f"{kind}={json.dumps(section)}", "--host", options.host]
        for kind, section in found.sections.items()
    }
    if options.lmcache_python is not None and found.redis_port:
        script = str(Path(__file__).with_name("tiers_lmcache.py"))
        commands["lmcache"] = [str(options.lmcache_python), script, str(found.redis_port)]
    async with AsyncExitStack() as stack:
        turns = {kind: await stack.enter_async_context(child(command)) for kind, command in commands.items()}
        server_s: dict[str, list[float]] = {kind: [] for kind in turns}
        for _ in range(5 * options.rounds + 1):
            for kind, mover in turns.items():
                before = cpu_of(found, "redis" if kind == "lmcache" else kind)
                await mover.once()
                server_s[kind].append(cpu_of(found, "redis" if kind == "lmcache" else kind) - before)
    return summary(turns, server_s)


def summary(turns: Mapping[str, Turns], server_s: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What is printed of them."""
    result: dict[str, Any] = {}
    for kind, mover in turns.items():
        result[kind] = {
            "gbps": GIGABYTES / mover.median("load_s"),
            "save_gbps": GIGABYTES / mover.median("save_s"),
            "cpu_s_per_gb": mover.median("load_cpu_s") / GIGABYTES,
            "save_cpu_s_per_gb": mover.median("save_cpu_s") / GIGABYTES,
            "server_cpu_s_per_gb": statistics.median(server_s[kind][1:]) / (2 * GIGABYTES),
        }
        if kind != "lmcache":
            result[kind]["share_of_copy"] = mover.median("copy_s") / mover.median("load_s")
    copies = [answer for mover in turns.values() for answer in mover.answers[1:] if "copy_s" in answer]
    result["memory"] = {
        "gbps": GIGABYTES / statistics.median(answer["copy_s"] for answer in copies),
        "cpu_s_per_gb": statistics.median(answer["copy_cpu_s"] for answer in copies) / GIGABYTES,
        "share_of_copy": 1.0,
    }
    if "disk" in turns:
        result["disk_of_device"] = turns["disk"].median("load_s") / turns["disk"].median("device_s")
    if "lmcache" in turns and "redis" in turns:
        both = [turns[kind].median("load_cpu_s") + turns[kind].median("save_cpu_s") for kind in ("redis", "lmcache")]
        result["redis_cpu_of_lmcache"] = both[0] / both[1]
        result["lmcache_client_gbps"] = result["lmcache"]["gbps"]
        result["lmcache_client_cpu_s_per_gb"] = result["lmcache"]["cpu_s_per_gb"]
    return result
