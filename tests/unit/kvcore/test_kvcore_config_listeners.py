"""Nothing listens where other machines reach it unless there is a secret, or the file says that it may."""

import re
from pathlib import Path

import pytest

from kvcore.config.checks import heard_elsewhere, open_line
from kvcore.config.file import load_config
from kvcore.errors import ConfigError
from kvferry.doctor.findings import Context
from kvferry.doctor.security import check_security

ROOT = Path(__file__).resolve().parents[3]
SIM, PLAIN = ROOT / "configs/sim-2p2d.yaml", ROOT / "configs/plain-vllm-nixl.yaml"
SECRET = "security.secret.file=secret"


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("router.host=0.0.0.0", "router.host"),
        ("router.host='::'", "router.host"),
        ("router.host=10.0.0.1", "router.host"),
        ("routers=['10.0.0.1:8001']", "routers[0]"),
        ("metadata_server.host=meta", "metadata_server.host"),
        ("nodes.decode-0.host=gpu-0", "nodes.decode-0.host"),
        ("nodes.decode-0.host=128.0.0.1", "nodes.decode-0.host"),
    ],
)
def test_a_listener_that_others_reach_needs_a_secret_or_a_word(override, path):
    with pytest.raises(
        ConfigError, match=rf"{re.escape(path)}: \S+ is reached from other machines.*security\.secret"
    ) as raised:
        load_config(SIM, [override])
    assert "security.open: true" in raised.value.message
    assert heard_elsewhere(load_config(SIM, [override, SECRET]))[0][0] == path
    assert open_line(load_config(SIM, [override, SECRET])) is None
    assert path in (open_line(load_config(SIM, [override, "security.open=true"])) or "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "'::1'", "127.0.0.2"])
def test_this_machines_own_addresses_need_neither(host):
    config = load_config(SIM, [f"router.host={host}"])
    assert heard_elsewhere(config) == []
    assert open_line(load_config(SIM, [f"router.host={host}", "security.open=true"])) is None, "nobody else reaches it"


def test_a_router_before_servers_of_others_is_held_to_it_too():
    assert "router.host 0.0.0.0" in (open_line(load_config(PLAIN)) or "")
    with pytest.raises(ConfigError, match="reached from other machines"):
        load_config(PLAIN, ["security.open=false"])


def test_open_and_a_secret_contradict_each_other():
    with pytest.raises(ConfigError, match=r"security\.open: a cluster with a secret is not open"):
        load_config(SIM, [SECRET, "security.open=true"])


@pytest.mark.parametrize("kind", ["shm", "ucx", "nixl"])
def test_only_tcp_has_frames_that_macs_can_be_made_of(kind):
    wanted = [SECRET, "transport.integrity=frames"]
    assert load_config(SIM, [*wanted, "transport.kind=tcp"]).transport.integrity == "frames"
    assert load_config(SIM, wanted).transport.kind == "auto"
    with pytest.raises(ConfigError, match=r"transport\.integrity: only tcp has frames"):
        load_config(SIM, [*wanted, f"transport.kind={kind}"])


def test_nodes_of_the_file_must_be_listed_where_names_are():
    with pytest.raises(ConfigError, match=r"nodes\.prefill-0: security\.nodes does not list it"):
        load_config(SIM, ["security.nodes=[prefill-1, decode-0, decode-1]"])


def test_the_doctor_says_that_a_cluster_is_open_and_which_secret_signs(tmp_path):
    (finding,) = check_security(Context(load_config(SIM, ["router.host=0.0.0.0", "security.open=true"])))
    assert finding.ok and "the cluster is open" in finding.detail
    assert check_security(Context(load_config(SIM))) == []
    missing = f"security.secret.file={tmp_path / 'none'}"
    (finding,) = check_security(Context(load_config(SIM, [missing])))
    assert not finding.ok and "no such file" in finding.detail
