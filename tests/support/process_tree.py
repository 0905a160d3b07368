"""Who has started whom."""

import psutil


def children(pid: int) -> list[int]:
    """Those that it has started itself."""
    return [process.pid for process in psutil.Process(pid).children()]


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    return [process.pid for process in psutil.Process(pid).children(recursive=True)]
