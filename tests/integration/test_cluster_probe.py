"""`kvferry doctor --probe` as people run it, on a cluster that works and on one whose nodes are killed or stopped."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from support.processes import Cluster, cluster

pytestmark = pytest.mark.slow

BOUND_S = 60.0


class Doctor:
    """The command while it runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ended(self) -> tuple[int, str]:
        async with asyncio.timeout(BOUND_S):
            out, err = await self.process.communicate()
        assert not err, err.decode()
        code = self.process.returncode
        assert code is not None
        return code, out.decode()


@asynccontextmanager
async def doctor(subject: Cluster) -> AsyncIterator[Doctor]:
    command = [sys.executable, "-m", "kvferry", "doctor", "--probe", str(subject.file)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        yield Doctor(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def nothing_reserved(subject: Cluster) -> None:
    async with asyncio.timeout(60):
        while (await subject.stats()).reservations:  # noqa: ASYNC110 - another process holds them
            await asyncio.sleep(0.02)


@asynccontextmanager
async def running(folder: Path, transport: str) -> AsyncIterator[Cluster]:
    async with cluster(folder, transport=transport) as subject:
        await subject.start("metadata", "p0", "d0", "s0")
        await subject.joined("p0", "d0", "s0")
        yield subject


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_each_pair_of_a_cluster_that_runs_is_measured_and_nothing_is_left(tmp_path: Path, transport: str) -> None:
    async with running(tmp_path, transport) as subject:
        before = {name: psutil.Process(child.pid).num_fds() for name, child in subject.children.items()}
        async with doctor(subject) as command:
            code, out = await command.ended()
        assert code == 0, out
        for pair in ("p0 -> d0", "p0 -> s0", "d0 -> p0", "d0 -> s0"):
            assert any(pair in line and line.startswith(("ok", "warn")) for line in out.splitlines()), out
        assert f" {transport} " in out and "GB/s" in out and " us " in out
        await nothing_reserved(subject)
        stats = await subject.stats()
        assert stats.objects == 0 and not stats.counters.get("committed") and not stats.counters.get("evicted")
        after = {name: psutil.Process(child.pid).num_fds() for name, child in subject.children.items()}
        assert all(after[name] <= before[name] + 4 for name in before), (before, after)  # keep-alive, idle connections


async def test_nodes_that_were_killed_are_named_and_the_rest_is_measured(tmp_path: Path) -> None:
    async with running(tmp_path, "tcp") as subject:
        subject.children["d0"].kill()
        async with doctor(subject) as command:
            code, out = await command.ended()
        assert code == 1, out
        wrong = [line for line in out.splitlines() if line.startswith("wrong")]
        assert wrong and all("d0" in line for line in wrong), out
        assert any("p0 -> s0" in line and line.startswith(("ok", "warn")) for line in out.splitlines()), out
        await nothing_reserved(subject)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_peer_that_ends_or_stops_in_the_middle_is_told_within_a_bound(
    tmp_path: Path, sign: signal.Signals
) -> None:
    async with running(tmp_path, "tcp") as subject:
        pid = subject.children["s0"].pid
        async with doctor(subject) as command:
            async with asyncio.timeout(60):
                while not (await subject.stats()).reservations:  # noqa: ASYNC110 - another process makes them
                    await asyncio.sleep(0.001)
            os.kill(pid, sign)
            try:
                code, out = await command.ended()
            finally:
                if sign == signal.SIGSTOP:
                    os.kill(pid, signal.SIGCONT)
        assert code == 1, out
        wrong = [line for line in out.splitlines() if line.startswith("wrong")]
        assert wrong and all("-> s0" in line for line in wrong), out
        await nothing_reserved(subject)
