"""Where the transfer benchmark runs: on one host, or in two network namespaces joined by veth, as two machines.

Needs root and `ip` for the namespaces. Owns them; what a killed run left behind goes with the next.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_ADDRESSES = ("10.98.64.1", "10.98.64.2")
_PREFIX = "kvbench"


@dataclass(frozen=True, slots=True)
class Place:
    """Two ends. `initiator` and `target` go in front of a command that is to run there."""

    name: str
    initiator: tuple[str, ...]
    target: tuple[str, ...]
    initiator_host: str
    target_host: str
    device: str
    """The network interface between them."""

    @property
    def one_host(self) -> bool:
        """Whether both ends can share memory."""
        return self.initiator == self.target

    @property
    def has_lan_address(self) -> bool:
        """Whether its addresses are others than loopback: Mooncake's clients refuse a host without."""
        return not self.target_host.startswith("127.")


@contextmanager
def places() -> Iterator[tuple[list[Place], str]]:
    """The places that there are, and why the second is missing ("" if it is not).

    With namespaces, the same host is one of them too: its only address is then the veth's, as Mooncake wants it.
    """
    reason = _no_namespaces()
    if reason:
        yield [Place("same host", (), (), "127.0.0.1", "127.0.0.1", "lo")], f"needs {reason}"
        return
    _remove_left_behind()
    names = [f"{_PREFIX}{os.getpid()}{side}" for side in "ab"]
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for name, address in zip(names, _ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/30", "dev", "veth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "veth0", "up")
        inside = [("ip", "netns", "exec", name) for name in names]
        yield (
            [
                Place("same host", inside[1], inside[1], _ADDRESSES[1], _ADDRESSES[1], "lo"),
                Place("namespaces", inside[0], inside[1], *_ADDRESSES, "veth0"),
            ],
            "",
        )


def _no_namespaces() -> str:
    if os.geteuid() != 0:
        return "root"
    return "" if shutil.which("ip") else "ip (iproute2)"


def _remove_left_behind() -> None:
    """Namespaces of a run that was killed."""
    for path in Path("/run/netns").glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX)[:-1]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            _ip("netns", "del", path.name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
