"""Child processes of a benchmark: started until they say what was waited for, ended with it, their CPU time read."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from kvcore.process.child import ChildProcess


@dataclass(frozen=True, slots=True)
class Child:
    """`said`: the first group of the first line that matched. Linux only."""

    pid: int
    said: str

    def cpu_s(self) -> float:
        """Processor time so far of all its threads, and of those of its children (what serves by UCX is one)."""
        return cpu_s_of(self.pid)


def cpu_s_of(pid: int) -> float:
    """Of a process and its children. What a thread that has ended used is not counted."""
    seconds = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
            seconds += sum(cpu_s_of(int(child)) for child in (task / "children").read_text().split())
    return seconds


def scratch_folder() -> TemporaryDirectory[str]:
    """A folder that goes with its context: in `build`, which lies on a disk, where /tmp may be none."""
    build = Path.cwd() / "build"
    build.mkdir(exist_ok=True)
    return TemporaryDirectory(dir=build)


def child(command: list[str], wanted: str, within_s: float = 30.0) -> AbstractAsyncContextManager[Child]:
    """`python *command`, once it has written a line that matches `wanted`. RuntimeError with its output if it ends."""
    return program([sys.executable, *command], wanted, within_s=within_s)


@asynccontextmanager
async def program(
    command: Sequence[str], wanted: str, pass_fds: Sequence[int] = (), within_s: float = 30.0
) -> AsyncIterator[Child]:
    """As `child`, for any command; the child inherits `pass_fds`."""
    found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if (match := re.search(wanted, line)) and not found.done():
            found.set_result(match.group(1))

    def on_end(_: object) -> None:
        if not found.done():
            found.set_exception(RuntimeError("\n".join([f"{' '.join(command)} ended:", *lines])))

    process = await ChildProcess.start(command, on_line=on_line, pass_fds=pass_fds)
    ended = asyncio.ensure_future(process.wait())
    ended.add_done_callback(on_end)
    try:
        async with asyncio.timeout(within_s):
            said = await found
        yield Child(process.pid, said)
    finally:
        await process.terminate(10)
        await ended


def cpu_s_with_children() -> float:
    """Processor time so far of this process, threads that have ended included, and of its children."""
    children = Path("/proc/self/task").glob("*/children")
    return time.process_time() + sum(cpu_s_of(int(pid)) for file in children for pid in file.read_text().split())
