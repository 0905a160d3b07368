"""Where the transfer benchmark runs: on one host, or in two network namespaces joined by veth, as two machines.

Needs root and `ip` for the namespaces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.namespaces import bring_up, ip, namespaces_need, two_namespaces

_ADDRESSES = ("10.98.64.1", "10.98.64.2")
_DEVICE = "veth0"


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
    reason = namespaces_need()
    if reason:
        yield [Place("same host", (), (), "127.0.0.1", "127.0.0.1", "lo")], f"needs {reason}"
        return
    with two_namespaces("kvbench") as names:
        ip("link", "add", _DEVICE, "netns", names[0], "type", "veth", "peer", "name", _DEVICE, "netns", names[1])
        bring_up(names, _DEVICE, _ADDRESSES)
        inside = [("ip", "netns", "exec", name) for name in names]
        yield (
            [
                Place("same host", inside[1], inside[1], _ADDRESSES[1], _ADDRESSES[1], "lo"),
                Place("namespaces", inside[0], inside[1], *_ADDRESSES, _DEVICE),
            ],
            "",
        )
