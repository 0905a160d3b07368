"""What UCX is told to use for a configuration, and what this machine has of it. Reads /sys/class; opens no UCX.

A device is named as UCX names it: an HCA (`mlx5_0`, or `mlx5_0:1` for one port of it) or a network interface (`eth0`),
which then carries TCP. Without names every active HCA is used, and none is an error: TCP is never taken unasked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import ConfigError

_SYS = Path("/sys/class")
_IFF_UP = 0x1


@dataclass(frozen=True, slots=True)
class UcxPlan:
    """`UCX_TLS`, `UCX_NET_DEVICES`, and the devices that UCX must then really have opened (empty: any)."""

    tls: str
    net_devices: str
    required: tuple[str, ...]

    @property
    def rdma(self) -> bool:
        """Whether RDMA is among what may be used."""
        return "ib" in self.tls.split(",")

    def options(self) -> dict[str, str]:
        """For `open_context`. Never posix, sysv or cma: a dead peer aborts or hangs its reader there.

        TCP has segments of 8 KiB unless told otherwise, and moves a quarter as much with them.
        """
        return {
            "TLS": self.tls,
            "NET_DEVICES": self.net_devices,
            "TCP_TX_SEG_SIZE": "1M",
            "TCP_RX_SEG_SIZE": "1M",
        }


def hca_ports(root: Path = _SYS) -> dict[str, str]:
    """`mlx5_0:1` -> state of the port, as the kernel words it (`ACTIVE`, `DOWN`, ...)."""
    found = {}
    for port in sorted((root / "infiniband").glob("*/ports/*")):
        try:
            state = (port / "state").read_text().strip().rpartition(" ")[2]
        except OSError:
            state = "unreadable"
        found[f"{port.parent.parent.name}:{port.name}"] = state
    return found


def plan_devices(devices: Sequence[str], root: Path = _SYS) -> UcxPlan:
    """Raises ConfigError naming each device that is not here or not up, and those that are."""
    ports = hca_ports(root)
    interfaces = {path.name: _is_up(path) for path in sorted((root / "net").glob("*"))}
    if not devices:
        active = [name for name, state in ports.items() if state == "ACTIVE"]
        if not active:
            raise ConfigError(
                "transport.kind: no HCA with an active port is here (HCA ports: "
                f"{_listed(f'{name} is {state}' for name, state in ports.items())}); name a network interface in "
                "transport.devices to run it over TCP, or use transport tcp",
                param="transport.kind",
            )
        return UcxPlan("ib,self", ",".join(active), ())
    chosen: list[str] = []
    wrong: list[str] = []
    for device in devices:
        matching = [name for name in ports if device in (name, name.partition(":")[0])]
        active = [name for name in matching if ports[name] == "ACTIVE"]
        if active:
            chosen += active
        elif matching:
            wrong.append(f"{device} has no active port ({', '.join(f'{m} is {ports[m]}' for m in matching)})")
        elif device not in interfaces:
            wrong.append(f"{device} is not on this machine")
        elif not interfaces[device]:
            wrong.append(f"{device} is down")
        else:
            chosen.append(device)
    if wrong:
        raise ConfigError(
            f"transport.devices: {', '.join(wrong)} (HCA ports here: {_listed(ports)}; interfaces: "
            f"{_listed(name for name, up in interfaces.items() if up)}); name one that is up",
            param="transport.devices",
        )
    kinds = (("ib", any(name in ports for name in chosen)), ("tcp", any(name not in ports for name in chosen)))
    tls = ",".join([name for name, used in kinds if used] + ["self"])
    return UcxPlan(tls, ",".join(chosen), tuple(chosen))


def read_resources(context_info: str) -> tuple[str, ...]:
    """`transport/device` of all that a context opened, from what `ucp_context_print_info` writes."""
    return tuple(line.rpartition("-- ")[2].strip() for line in context_info.splitlines() if " resource " in line)


def read_components(context_info: str) -> tuple[str, ...]:
    """Names of the components that UCX has loaded, used or not."""
    lines = (line.split() for line in context_info.splitlines())
    return tuple(words[4] for words in lines if words[1:2] == ["component"] and len(words) == 5)


def check_opened(plan: UcxPlan, resources: Iterable[str], build: str) -> None:
    """Raise ConfigError unless UCX opened what the plan requires. `resources` are `transport/device`."""
    opened = list(resources)
    devices = {name.partition("/")[2] for name in opened if not name.startswith("self/")}
    missing = [device for device in plan.required if device not in devices]
    if missing or not devices:
        raise ConfigError(
            f"transport.devices: {build} opened {_listed(opened)} but not {', '.join(missing) or 'a network'}; "
            "for an HCA it must be built with verbs (libucx0, DOCA-OFED) and find libibverbs and /dev/infiniband",
            param="transport.devices",
        )


def _is_up(interface: Path) -> bool:
    try:
        return bool(int((interface / "flags").read_text(), 16) & _IFF_UP)
    except (OSError, ValueError):
        return False


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
