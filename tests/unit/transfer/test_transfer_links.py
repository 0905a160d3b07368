"""Rates that the kernel states, read off a made-up /sys/class; interfaces of this machine."""

from pathlib import Path

import pytest

from kvcore.types import Segment
from transfer.links import Link, link_of


@pytest.fixture
def sys_class(tmp_path: Path) -> Path:
    files = {
        "infiniband/mlx5_0/ports/1/rate": "100 Gb/sec (4X EDR)\n",
        "infiniband/mlx5_1/ports/1/rate": "2.5 Gb/sec (1X SDR)\n",
        "infiniband/mlx5_1/ports/2/rate": "200 Gb/sec (4X HDR)\n",
        "net/eth0/speed": "25000\n",
        "net/veth0/speed": "-1\n",
        "net/down0/speed": "0\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "net/lo").mkdir()
    return tmp_path


def segment(tcp: str = "127.0.0.1:9") -> Segment:
    return Segment(id="d.1", node_id="d", size_bytes=4096, host_id="h", addresses={"tcp": tcp})


@pytest.mark.parametrize(
    ("shown", "devices", "gigabits"),
    [
        ("shm", (), None),
        ("ucx:rc_mlx5/mlx5_0@1.13.1", ("mlx5_0",), 100),
        ("ucx:rc_mlx5/mlx5_1:2@1.13.1", ("mlx5_1:2",), 200),
        ("ucx:rc_mlx5/mlx5_1:1@1.13.1", ("mlx5_1:1",), 2.5),
        ("ucx:rc_mlx5/mlx5_1@1.13.1", ("mlx5_1",), 200),
        ("ucx:rc_mlx5/mlx5_0,ud_mlx5/mlx5_0@1.13.1", ("mlx5_0",), 100),
        ("ucx:rc_mlx5/mlx5_0,tcp/eth0@1.13.1", ("mlx5_0", "eth0"), 125),
        ("ucx:tcp/veth0@1.13.1", ("veth0",), None),
        ("ucx:rc_mlx5/mlx5_0,tcp/veth0@1.13.1", ("mlx5_0", "veth0"), None),
        ("ucx@1.13.1", (), None),
        ("nixl:mlx5_0:1,mlx5_1:2@1.5.1", ("mlx5_0:1", "mlx5_1:2"), 300),
        ("nixl:down0@1.5.1", ("down0",), None),
        ("nixl:gone@1.5.1", ("gone",), None),
        ("tcp", ("lo",), None),
    ],
)
def test_the_rates_of_the_devices_in_use_are_added_up(
    sys_class: Path, shown: str, devices: tuple[str, ...], gigabits: float | None
) -> None:
    assert link_of(shown, segment(), sys_class) == Link(devices, gigabits and gigabits * 1e9 / 8)


@pytest.mark.parametrize("address", ["", "nonsense", "no-such-host.invalid:1", "127.0.0.1:99999"])
def test_an_address_that_leads_nowhere_has_no_interface(sys_class: Path, address: str) -> None:
    assert link_of("tcp", segment(address), sys_class) == Link()


def test_the_interface_of_an_ipv6_address_is_found(sys_class: Path) -> None:
    if not Path("/proc/net/if_inet6").exists() or " lo\n" not in Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 here")
    assert link_of("tcp", segment("[::1]:9"), sys_class) == Link(("lo",))
