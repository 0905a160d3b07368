"""Two network namespaces, for benchmarks and tests that want two machines. Needs root and `ip`.

Owns the namespaces; what a killed run left behind goes with the next.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_PAIRS = (("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"))
"""Ends of the names of the pairs that one process may have at a time."""


def namespaces_need() -> str:
    """What network namespaces need and this process has not; empty: nothing."""
    if os.geteuid() != 0:
        return "root"
    return "" if shutil.which("ip") else "ip (iproute2)"


@contextmanager
def two_namespaces(prefix: str) -> Iterator[tuple[str, str]]:
    """Their names. Nothing but a loopback that is down is in them. `prefix` is the caller's alone."""
    for path in Path("/run/netns").glob(f"{prefix}*"):
        pid = path.name.removeprefix(prefix)[:-1]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            ip("netns", "del", path.name)
    mine = f"{prefix}{os.getpid()}"
    names = next((f"{mine}{a}", f"{mine}{b}") for a, b in _PAIRS if not Path(f"/run/netns/{mine}{a}").exists())
    with ExitStack() as stack:
        for name in names:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
        yield names


def bring_up(names: tuple[str, str], device: str, addresses: tuple[str, str]) -> None:
    """`device` has one of the addresses, of one /30, in each; it and loopback are up."""
    for name, address in zip(names, addresses, strict=True):
        ip("-n", name, "addr", "add", f"{address}/30", "dev", device)
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "link", "set", device, "up")


def ip(*arguments: str) -> None:
    """Run `ip`. Raises RuntimeError with what it said."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
