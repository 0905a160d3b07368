"""Who has started whom; and making a process stand still."""

import os
import signal
import time
from pathlib import Path

import psutil


def children(pid: int) -> list[int]:
    """Those that it has started itself."""
    return [process.pid for process in psutil.Process(pid).children()]


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


def freeze(pid: int) -> None:
    """SIGSTOP, until each thread has obeyed: one that has a core runs on until another of them takes the signal."""
    deadline = time.monotonic() + 10
    os.kill(pid, signal.SIGSTOP)
    while not _stopped(pid):
        assert time.monotonic() < deadline, f"process {pid} runs on"
        os.sched_yield()


def _stopped(pid: int) -> bool:
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:  # a thread that ended meanwhile
        return False
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)
