"""Gives NixlConnector's nodes the cores that all other systems' nodes have.

On a CPU, vLLM 0.32's NixlConnector moves the worker's main thread to the machine's last core, which is to be kept free
for it; with one thread a node this is the thread that computes. And a thread of NIXL's own polls without end. On two
cores both nodes then share one of them with two polling threads, and prefill takes several times as long. Where there
are cores to spare that does not happen; so the computing thread is put back on the node's core here, and the polling
one may run anywhere, at the lowest priority.
"""

import asyncio
import os
from pathlib import Path

IDLE_S = 1.0


def group_members(group: int) -> dict[int, str]:
    """Process id -> command line, of a process group."""
    members: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                members[int(stat.parent.name)] = stat.with_name("cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return members


async def place_threads(group: int, core: int) -> None:
    """Of the vLLM worker in a process group, while it is idle. RuntimeError if there is none."""
    workers = [pid for pid, command in group_members(group).items() if command.startswith("VLLM::Worker")]
    if not workers:
        raise RuntimeError(f"no vLLM worker in process group {group}")
    for worker in workers:
        os.sched_setaffinity(worker, {core})
        before = _runnable_s(worker)
        await asyncio.sleep(IDLE_S)
        for thread, runnable_s in _runnable_s(worker).items():
            if thread != worker and runnable_s - before.get(thread, runnable_s) > IDLE_S / 2:
                os.sched_setaffinity(thread, range(os.cpu_count() or 1))
                os.setpriority(os.PRIO_PROCESS, thread, 19)


def _runnable_s(process: int) -> dict[int, float]:
    """Thread id -> seconds so far in which it ran or could have run."""
    return {
        int(task.name): sum(int(word) for word in (task / "schedstat").read_text().split()[:2]) / 1e9
        for task in Path(f"/proc/{process}/task").iterdir()
    }
