"""Where a file's routers are, and how each of them sees the file."""

from pathlib import Path

import pytest

from kvcore.config.file import load_config
from kvcore.config.servers import as_router_at, operators_urls_of, router_urls_of, routers_of
from kvcore.errors import ConfigError

SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"
TWO_MORE = "routers=['127.0.0.1:8001', '[::1]:8002']"


def test_each_router_sees_itself_as_the_router_and_the_rest_as_the_others() -> None:
    config = load_config(SIM, [TWO_MORE])
    assert routers_of(config) == [("127.0.0.1", config.router.port), ("127.0.0.1", 8001), ("::1", 8002)]
    seen = as_router_at(config, "127.0.0.1:8001")
    assert (seen.router.port, seen.routers) == (8001, [f"127.0.0.1:{config.router.port}", "[::1]:8002"])
    assert set(router_urls_of(seen)) == set(router_urls_of(config))
    assert as_router_at(config, None) is config
    with pytest.raises(ConfigError, match=r"--at 127\.0\.0\.1:9: the file's routers are .*, 127\.0\.0\.1:8001"):
        as_router_at(config, "127.0.0.1:9")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("routers=['127.0.0.1']", "routers: 127.0.0.1: expected HOST:PORT"),
        ("routers=['0.0.0.0:8001']", "routers: every interface is none"),
        ("routers=['127.0.0.1:8000']", "routers[0]: 8000 on 127.0.0.1 is router.port already"),
        ("nodes.router-2={role: decoder, port: 9999}", "the name stands for the cluster's own router-2"),
    ],
)
def test_a_router_that_cannot_be_reached_is_refused_by_name(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(SIM, [override, "router.port=8000", "security.open=true"])
    assert says in raised.value.message


def test_several_routers_have_the_operators_port_each_on_a_host_of_its_own() -> None:
    apart = ["router.admin_port=9100", "security.open=true"]
    config = load_config(SIM, [*apart, "routers=['192.0.2.1:8000', '192.0.2.2:8000']"])
    hosts = ["127.0.0.1", "192.0.2.1", "192.0.2.2"]
    assert operators_urls_of(config) == [f"http://{host}:9100" for host in hosts]
    with pytest.raises(ConfigError, match=r"router\.admin_port: two of `routers` are on one host"):
        load_config(SIM, [*apart, "routers=['127.0.0.1:8001']"])
    with pytest.raises(ConfigError, match=r"router\.admin_host: each of several routers"):
        load_config(SIM, [*apart, "routers=['192.0.2.1:8000']", "router.admin_host=192.0.2.9"])
