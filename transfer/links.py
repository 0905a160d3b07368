"""What the links under a transport should give: rates as the kernel states them. Reads /sys/class, opens no device."""

import fcntl
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import ConfigError
from kvcore.types import Segment
from transfer.tcp.sockets import split_address

_SYS = Path("/sys/class")
_SIOCGIFADDR = 0x8915
"""An interface's first IPv4 address (netdevice(7))."""
_IFREQ_BYTES, _ADDRESS_AT = 40, 20


@dataclass(frozen=True, slots=True)
class Link:
    """Devices that carry the bytes, and their rates added up; None: one of them states none, as virtual ones do."""

    devices: tuple[str, ...] = ()
    bytes_per_s: float | None = None


def link_of(shown: str, segment: Segment, root: Path = _SYS) -> Link:
    """The link from here to `segment` by a transport that describes itself as `shown` (`tcp`,
    `ucx:rc_mlx5/mlx5_0,tcp/eth0@1.13.1`, `nixl:mlx5_0:1@1.5.1`). May ask a name server: not for an event loop.

    Shared memory has no link.
    """
    kind, _, rest = shown.partition(":")
    devices = tuple(dict.fromkeys(lane.rpartition("/")[2] for lane in rest.rpartition("@")[0].split(",") if lane))
    if kind == "tcp" and not devices:
        interface = _interface_to(segment.addresses.get(kind, ""))
        devices = (interface,) if interface else ()
    rates = [_rate(device, root) for device in devices]
    known = [rate for rate in rates if rate is not None]
    return Link(devices, sum(known) if known and len(known) == len(rates) else None)


def _rate(device: str, root: Path) -> float | None:
    """Bytes/s of an HCA (`mlx5_0`: its fastest port, `mlx5_0:1`: that one) or of a network interface."""
    name, _, port = device.partition(":")
    ports = [_first_number(path) for path in (root / "infiniband" / name / "ports").glob(f"{port or '*'}/rate")]
    gigabits = max((rate for rate in ports if rate is not None), default=None)
    if gigabits is not None:
        return gigabits * 1e9 / 8
    megabits = _first_number(root / "net" / device / "speed")
    return megabits * 1e6 / 8 if megabits is not None else None


def _first_number(file: Path) -> float | None:
    """Of `100 Gb/sec (4X EDR)`, or of `25000`; None for what is not above 0 or cannot be read."""
    try:
        found = re.match(r"\d+(\.\d+)?", file.read_text())
    except OSError:
        return None
    return float(found[0]) or None if found else None


def _interface_to(address: str) -> str | None:
    """The interface that packets to `host:port` leave by; None where the kernel does not tell us."""
    try:
        host, port = split_address(address)
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as asked:
            asked.connect(target)  # a datagram socket: picks the route and sends nothing
            ours = str(asked.getsockname()[0])
    except (OSError, UnicodeError, ConfigError):
        return None
    return next((name for _, name in socket.if_nameindex() if _has_address(name, ours, family)), None)


def _has_address(interface: str, address: str, family: int) -> bool:
    if family == socket.AF_INET6:
        wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        try:
            lines = Path("/proc/net/if_inet6").read_text().split("\n")
        except OSError:
            return False
        return any(words[:1] == [wanted] and words[-1] == interface for words in map(str.split, lines))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            request = struct.pack(f"{_IFREQ_BYTES}s", interface.encode())
            reply = fcntl.ioctl(asked, _SIOCGIFADDR, request)
        except OSError:  # it has none
            return False
    found = socket.inet_ntoa(reply[_ADDRESS_AT : _ADDRESS_AT + 4])
    return found == address or (interface == "lo" and address.startswith("127."))
