import json
import resource
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from support.nixl import needs_nixl
from support.ports import free_ports
from support.transports import LIBRARY
from support.ucx import needs_ucx
from tokenizers import Tokenizer, models

from kvcore.config.fields import ByteSize
from kvcore.config.schema import (
    ClusterConfig,
    MetadataServerConfig,
    ModelConfig,
    NodeConfig,
    RouterConfig,
    SimEngineConfig,
    TorchEngineConfig,
    TransportConfig,
)
from kvcore.errors import ConfigError
from kvcore.ports import listen
from kvcore.types import Role
from kvferry import cli
from kvferry.doctor import checks as doctor
from kvferry.doctor.checks import check_descriptors, check_memory, check_model, check_ports, preflight
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.transports import check_transports
from kvferry.machine import is_local, size_text
from transfer.memory.available import AvailableMemory
from transfer.nixl import host as nixl_host
from transfer.ucx.probe import UcxProbe


def cluster(**changes: object) -> ClusterConfig:
    base: dict[str, object] = {
        "cluster": "c",
        "model": ModelConfig(path="sim", name="sim"),
        "engine": SimEngineConfig(num_blocks=16),
        "nodes": {"d": NodeConfig(role=Role.DECODER, port=0, segment=ByteSize(1 << 20))},
        "metadata_server": MetadataServerConfig(port=0),
        "router": RouterConfig(port=0),
    }
    return ClusterConfig(**{**base, **changes})


def torch_cluster(path: Path) -> ClusterConfig:
    return cluster(model=ModelConfig(path=str(path), name="m"), engine=TorchEngineConfig())


def test_a_port_in_use_says_which_and_what_to_do():
    with listen("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        (finding,) = check_ports(Context(cluster(router=RouterConfig(port=port))))
    assert not finding.ok and f"127.0.0.1:{port} is in use by pid" in finding.detail
    assert finding.remedy == "stop it, or set another port (router.port)"


def test_a_whole_cluster_needs_numbered_ports_and_addresses_of_this_machine():
    nodes = {"d": NodeConfig(role=Role.DECODER, host="192.0.2.1", port=9)}
    findings = {f.subject: f for f in check_ports(Context(cluster(nodes=nodes), all_here=True))}
    assert not findings["port router"].ok and findings["port router"].detail == "router.port is 0"
    assert not findings["port d"].ok and "no interface of this machine" in findings["port d"].detail
    (elsewhere,) = check_ports(Context(cluster(nodes=nodes)))
    assert elsewhere.ok and "another machine's" in elsewhere.detail


def test_a_missing_model_folder_is_named_with_the_command_that_makes_it(tmp_path):
    (finding,) = check_model(Context(torch_cluster(tmp_path / ".cache/kvferry/models/m")))
    assert not finding.ok and "does not exist" in finding.detail
    assert finding.remedy.startswith("kvferry prepare-demo-model")


def test_a_broken_model_folder_is_told_file_by_file(tmp_path):
    def wrong() -> str:
        finding = check_model(Context(torch_cluster(tmp_path)))[0]
        assert not finding.ok
        return finding.detail

    assert "config.json" in wrong()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert "BertModel" in wrong()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    assert "tokenizer.json" in wrong()
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "safetensors" in wrong()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 10**9) + b"{}")
    assert "model.safetensors" in wrong()


def test_a_tokenizer_that_does_not_load_is_wrong(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    finding = doctor._check_tokenizer(tmp_path)
    assert not finding.ok and "cannot be read" in finding.detail


def test_a_chat_template_that_the_router_cannot_read_is_told_of_and_costs_chats_alone(tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert "1 tokens, no chat template" in doctor._check_tokenizer(tmp_path).detail
    (tmp_path / "chat_template.jinja").write_text("{% for x in %}")
    finding = doctor._check_tokenizer(tmp_path)
    assert finding.ok and "chat template 'default' cannot be read" in finding.detail
    assert finding.detail.endswith("only /v1/completions will work")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert doctor._check_tokenizer(tmp_path).detail == "1 tokens, a chat template"


def test_a_weight_file_that_is_a_dead_link_is_told_not_raised(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    findings = doctor.run_checks(Context(torch_cluster(tmp_path)), (check_model, check_memory))
    assert not findings[0].ok and findings[0].subject == "model"


def test_too_little_memory_says_how_much_and_what_to_lower(monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: AvailableMemory(200 << 20, "limit of the container"))
    nodes = {"d": NodeConfig(role=Role.DECODER, port=0, segment=ByteSize(1 << 30))}
    (finding,) = check_memory(Context(cluster(nodes=nodes)))
    assert not finding.ok and "segment" in finding.remedy
    assert (
        "1.0 GiB of it segments" in finding.detail and "200.0 MiB available (limit of the container)" in finding.detail
    )


def test_a_device_for_ucx_that_is_not_here_is_named_with_those_that_are():
    (finding,) = check_transports(Context(cluster(transport=TransportConfig(kind="ucx", devices=["mlx5_77"]))))
    assert finding.subject == "transport ucx" and not finding.ok
    assert "mlx5_77 is not on this machine" in finding.detail and "name one that is up" in finding.remedy
    fallback = TransportConfig(kind="ucx", devices=["mlx5_77"], fallback="tcp")
    by_subject = {finding.subject: finding for finding in check_transports(Context(cluster(transport=fallback)))}
    assert by_subject["transport ucx"].ok and "tcp is used instead" in by_subject["transport ucx"].detail


@pytest.mark.ucx
@needs_ucx[1]
def test_what_ucx_would_use_is_shown_with_its_build():
    transport = TransportConfig(kind="ucx", devices=["lo"], ucx_library=LIBRARY)
    (finding,) = check_transports(Context(cluster(transport=transport)))
    assert finding.ok and "UCX 1." in finding.detail and "tcp/lo" in finding.detail


def nixl_finding(**transport: object) -> Finding:
    return next(
        finding
        for finding in check_transports(Context(cluster(transport=TransportConfig(kind="nixl", **transport))))
        if finding.subject == "transport nixl"
    )


def without_wheel() -> NoReturn:
    raise ConfigError("transport.kind: nixl needs the wheel nixl-cu12; install it with `pip install nixl-cu12`")


def test_nixl_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(nixl_host, "load_nixl", without_wheel)
    finding = nixl_finding(devices=["lo"])
    assert not finding.ok and "needs the wheel nixl-cu12" in finding.detail and "pip install" in finding.remedy
    finding = nixl_finding(devices=["lo"], fallback="tcp")
    assert finding.ok and "needs the wheel nixl-cu12" in finding.detail and "tcp is used instead" in finding.detail


def test_a_device_for_nixl_that_is_not_here_is_named_with_those_that_are():
    finding = nixl_finding(devices=["mlx5_77"])
    assert not finding.ok and "mlx5_77 is not on this machine" in finding.detail
    assert "name one that is up" in finding.remedy


def test_nixl_over_an_hca_is_shown_with_both_builds_and_needs_memory_that_may_be_pinned(monkeypatch):
    library = SimpleNamespace(build="NIXL 1.5.1 with UCX 1.23.0")
    probe = UcxProbe("UCX 1.23.0", ("tcp", "ib"), ("rc_mlx5/mlx5_0:1",), rdma=True)
    monkeypatch.setattr(nixl_host, "open_nixl", lambda *_: (library, None, probe))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    findings = check_transports(Context(cluster(transport=TransportConfig(kind="nixl", devices=["mlx5_0"]))))
    assert findings[0].detail == "NIXL 1.5.1 with UCX 1.23.0 with verbs uses rc_mlx5/mlx5_0:1"
    assert not findings[1].ok and findings[1].subject == "memlock" and "8.0 MiB" in findings[1].detail


@needs_nixl[0]
@needs_nixl[1]
def test_what_nixl_would_use_is_shown_with_its_builds():
    finding = nixl_finding(devices=["lo"])
    assert finding.ok and "NIXL 1." in finding.detail and "UCX 1." in finding.detail and "tcp/lo" in finding.detail


def test_shared_memory_and_tcp_work_here():
    findings = check_transports(Context(cluster()))
    assert [(finding.subject, finding.ok) for finding in findings] == [("transport shm", True), ("transport tcp", True)]


def test_preflight_tells_all_that_is_wrong_at_once():
    with pytest.raises(ConfigError) as caught:
        preflight(cluster(transport=TransportConfig(kind="ucx", devices=["mlx5_77"])))
    lines = caught.value.message.splitlines()
    assert lines[0].startswith("transport ucx: transport.devices: mlx5_77 is not on this machine")
    assert any(line.startswith("port router: router.port is 0; give it a number") for line in lines)


def test_this_machine_is_told_from_others():
    assert is_local("127.0.0.1") and is_local("localhost") and is_local("0.0.0.0")
    assert not is_local("192.0.2.1") and not is_local("no-such-host.invalid")


def test_sizes_for_people():
    assert [size_text(n) for n in (5, 2048, 3 << 20, 5 << 30)] == ["5 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]


def test_the_command_exits_1_and_prints_the_remedy(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(
        "{cluster: c, model: {path: sim, name: sim}, engine: {kind: sim, block_size: 16}, transport: ucx,"
        f" devices: [mlx5_77], nodes: {{d: {{role: decoder, port: {free_ports(1)[0]}, segment: 1MiB}}}},"
        " router: {port: 0}, metadata_server: {port: 0}}"
    )
    assert cli.main(["doctor", str(file)]) == 1
    out = capsys.readouterr().out
    assert "ok    python" in out and "wrong transport ucx" in out and "-> name one that is up" in out
    assert cli.main(["doctor", str(file), "--set", "transport=auto", "--set", "devices=[]"]) == 0
    assert cli.main(["doctor", str(file), "--set", "transprot=auto"]) == 1
    assert "did you mean transport?" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "ok"), [(4096, False), (5000, True)])
def test_descriptors_must_do_for_the_requests_that_are_allowed(monkeypatch, limit, ok):
    monkeypatch.setattr(doctor, "hard_limit", lambda: limit)
    (finding,) = check_descriptors(Context(cluster(router=RouterConfig(port=0, max_requests=1024))))
    assert finding.ok == ok and finding.detail.startswith(f"{limit:,} allowed (ulimit -Hn), 4,161 needed")
    if ok:
        return
    assert "LimitNOFILE=" in finding.remedy and finding.remedy.endswith("or lower router.max_requests to 1,007")
    lower = cluster(router=RouterConfig(port=0, max_requests=1007))
    assert check_descriptors(Context(lower))[0].ok
    assert not check_descriptors(Context(cluster(router=RouterConfig(port=0, max_requests=1008))))[0].ok


def test_descriptors_of_a_router_elsewhere_are_not_this_machines():
    assert not check_descriptors(Context(cluster(router=RouterConfig(host="192.0.2.1", port=1))))
