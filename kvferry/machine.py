"""What this machine has: memory left to us, addresses."""

import socket
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_LIMIT_FILES = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_NO_LIMIT = 1 << 60


def available_memory() -> tuple[int, str]:
    """Bytes that can still be used, and what limits them."""
    free = psutil.virtual_memory().available
    left = cgroup_memory_left(_CGROUP)
    return (left, "limit of the container") if left is not None and left < free else (free, "memory of the machine")


def cgroup_memory_left(root: Path) -> int | None:
    """Bytes below the limit of the cgroup (v2 or v1) mounted at `root`; None where there is no limit."""
    for limit_name, usage_name in _LIMIT_FILES:
        try:
            limit, usage = (root / limit_name).read_text().strip(), (root / usage_name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and int(limit) < _NO_LIMIT:
            return max(0, int(limit) - int(usage))
    return None


def is_local(host: str) -> bool:
    """Whether an address of `host` is this machine's. An unknown name is not."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    return any(_binds(family, address) for family, _, _, _, address in found)


def _binds(family: int, address: object) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(address)  # type: ignore[arg-type]  # as getaddrinfo gave it
        except OSError:
            return False
    return True


def size_text(num_bytes: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
