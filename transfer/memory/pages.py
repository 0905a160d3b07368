"""What pages a segment's memory is made of and where they lie: huge pages, and one NUMA node.

Owns no memory. A request that cannot be met is a ConfigError that says what to do: nothing less is given silently.
"""

import ctypes
import functools
import os
import platform
from enum import StrEnum
from pathlib import Path

from kvcore.errors import ConfigError

_SYSFS = Path("/sys")
_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235}
_MPOL_BIND = 2
_MASK_BITS = ctypes.sizeof(ctypes.c_ulong) * 8
_SHMEM_ENABLED = "kernel/mm/transparent_hugepage/shmem_enabled"


class Pages(StrEnum):
    """Kinds of memory for a segment."""

    NORMAL = "normal"
    RESERVED = "reserved huge pages"
    """hugetlbfs: set aside by vm.nr_hugepages, not part of the available memory."""
    TRANSPARENT = "transparent huge pages"
    """The kernel takes them where it finds them."""


def choose_pages(size_bytes: int, *, hugepages: bool, numa_node: int | None = None, sysfs: Path = _SYSFS) -> Pages:
    """What `size_bytes` can be made of: reserved huge pages if enough are free (on the node), else transparent ones.

    Raises ConfigError: no such node; no huge pages of either kind.
    """
    if numa_node is not None and not (sysfs / f"devices/system/node/node{numa_node}").exists():
        there = sorted(path.name for path in (sysfs / "devices/system/node").glob("node[0-9]*"))
        raise ConfigError(
            f"numa_node: {numa_node} is none of this machine's nodes ({', '.join(there) or 'none known'}); "
            "name one of them or leave it out"
        )
    if not hugepages:
        return Pages.NORMAL
    page_bytes = default_hugepage_bytes()
    wanted = -(-size_bytes // page_bytes)
    free = _free_hugepages(page_bytes, numa_node, sysfs)
    if free >= wanted:
        if size_bytes % page_bytes:
            raise ConfigError(f"segment: {size_bytes} bytes are no multiple of a huge page; {page_bytes} are one")
        return Pages.RESERVED
    enabled = _selected(sysfs / _SHMEM_ENABLED)
    if enabled in ("always", "within_size", "advise", "force"):
        return Pages.TRANSPARENT
    where = f" on node {numa_node}" if numa_node is not None else ""
    raise ConfigError(
        f"hugepages: {wanted} reserved huge pages of {page_bytes >> 10} KiB are needed and {free} are free{where}, and "
        f"transparent ones are off for shared memory ({enabled or 'not in this kernel'}); "
        f"reserve them (`sysctl vm.nr_hugepages={wanted}`) or allow the others (`echo advise > /sys/{_SHMEM_ENABLED}`)"
    )


def bind_to_node(address: int, num_bytes: int, node: int) -> None:
    """Let the not yet allocated pages of a mapping come from `node` alone. Raises ConfigError."""
    number = _MBIND.get(platform.machine())
    if number is None:
        raise ConfigError(f"numa_node: not known how to bind memory on {platform.machine()}; leave it out")
    mask = (ctypes.c_ulong * (node // _MASK_BITS + 1))()
    mask[node // _MASK_BITS] = 1 << node % _MASK_BITS
    code = _syscall()(
        number,
        ctypes.c_ulong(address),
        ctypes.c_ulong(num_bytes),
        ctypes.c_int(_MPOL_BIND),
        ctypes.byref(mask),
        ctypes.c_ulong(_MASK_BITS * len(mask) + 1),
        ctypes.c_uint(0),
    )
    if code != 0:
        error = os.strerror(ctypes.get_errno())
        raise ConfigError(f"numa_node: memory cannot be bound to node {node}: {error}; leave it out or name another")


@functools.cache
def default_hugepage_bytes() -> int:
    """Of a huge page, as memfd_create gives them; 2 MiB where the kernel has none."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    return 2 << 20


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def _free_hugepages(page_bytes: int, numa_node: int | None, sysfs: Path) -> int:
    """Free and not promised to anyone. Per node the kernel tells only those that are free."""
    name = f"hugepages/hugepages-{page_bytes >> 10}kB"
    if numa_node is not None:
        return _number(sysfs / f"devices/system/node/node{numa_node}" / name / "free_hugepages")
    folder = sysfs / "kernel/mm" / name
    return _number(folder / "free_hugepages") - _number(folder / "resv_hugepages")


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _selected(path: Path) -> str:
    """The word in brackets."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


@functools.cache
def _syscall() -> "ctypes._NamedFuncPointer":
    return ctypes.CDLL(None, use_errno=True).syscall
