"""How much memory this process may still use: the machine's MemAvailable and every cgroup above us (v2 and v1)."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """The tightest bound found and where it comes from (for error messages)."""

    size_bytes: int
    source: str


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> AvailableMemory:
    """Page cache counts as available. Limits that cannot be read do not count: a missing file is no bound."""
    bounds = [AvailableMemory(_mem_available(proc), "MemAvailable of the machine")]
    for line in _lines(proc / "self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            bounds += _headroom_up(cgroups, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            bounds += _headroom_up(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    return min(bounds, key=lambda bound: bound.size_bytes)


def _headroom_up(root: Path, path: str, limit: str, usage: str, prefix: str) -> list[AvailableMemory]:
    """Headroom of the group at `path` and of each one above; in a container `path` may lie outside of what we see."""
    found = []
    group = root / path.strip("/")
    for folder in [group, *group.parents]:
        if not folder.is_relative_to(root):
            break
        limit_bytes, used_bytes = _number(folder / limit), _number(folder / usage)
        if limit_bytes is None or used_bytes is None:
            continue
        stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
        cache = sum(int(stat.get(prefix + name, 0)) for name in ("active_file", "inactive_file"))
        found.append(AvailableMemory(max(0, limit_bytes - used_bytes + cache), f"limit of cgroup {folder}"))
    return found


def _mem_available(proc: Path) -> int:
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
