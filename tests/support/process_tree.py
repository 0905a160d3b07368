"""Who has started whom, from /proc."""

from pathlib import Path


def children(pid: int) -> list[int]:
    """Of all its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def descendants(pid: int) -> list[int]:
    """Its children, theirs, and so on."""
    return [found for child in children(pid) for found in (child, *descendants(child))]
