"""The doctor looks at a Mooncake tier as a node will use it: its package, master, RDMA, the memory that it takes."""

import msgspec
import pytest
from support.mooncake_server import HOST, mooncake_server, with_mooncake
from support.ports import free_ports

from kvcore.config.checks import check_cluster
from kvcore.config.fields import ByteSize
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, SimEngineConfig
from kvcore.config.tiers import MooncakeTierConfig, TiersConfig
from kvcore.types import Role
from kvferry.doctor import mooncake
from kvferry.doctor.checks import ALL_CHECKS, check_memory
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.mooncake import check_mooncake

CONFIG = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="m", name="m"),
    engine=SimEngineConfig(),
    nodes={"d0": NodeConfig(role=Role.DECODER, host="127.0.0.1", port=8712, segment=ByteSize(1 << 30))},
)


def config_of(**section: object) -> ClusterConfig:
    tier = MooncakeTierConfig(**{"master": "127.0.0.1:1", **section})  # type: ignore[arg-type]
    return msgspec.structs.replace(CONFIG, tiers=TiersConfig(mooncake=tier))


def finding_for(**section: object) -> Finding:
    (finding,) = check_mooncake(Context(config_of(**section)))
    return finding


def test_no_mooncake_needs_no_check():
    assert check_mooncake(Context(CONFIG)) == [] and check_mooncake in ALL_CHECKS


def test_rdma_is_refused_where_no_device_is():
    finding = finding_for(protocol="rdma", rdma_devices=["mlx5_99"])
    assert not finding.ok and "rdma_devices: mlx5_99 cannot be used" in finding.detail


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("ImportError: libibverbs.so.1: cannot open shared object file", "apt install libibverbs1"),
        ("ModuleNotFoundError: No module named 'mooncake'", "pip install mooncake-transfer-engine-non-cuda"),
    ],
)
def test_a_client_that_cannot_be_loaded_is_told_with_what_to_install(monkeypatch, said, remedy):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(mooncake, "_not_loaded", lambda: said)
    finding = finding_for()
    assert not finding.ok and said in finding.detail and remedy in finding.remedy


def test_a_package_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    finding = finding_for()
    assert not finding.ok and "not installed" in finding.detail and finding.remedy.startswith("pip install mooncake-")


@with_mooncake
def test_a_master_that_is_away_and_one_that_is_there():
    away = finding_for(master=f"127.0.0.1:{free_ports(1)[0]}")
    assert not away.ok and "Connection refused" in away.detail and "tiers.mooncake.master" in away.remedy
    with mooncake_server() as server, server.machines.entered():
        there = finding_for(master=server.master)
        assert there.ok and there.detail.startswith(f"mooncake://{HOST}:50051 over tcp; no node lends memory to it")
        lending = finding_for(master=server.master, global_segment_size=ByteSize(2 << 30))
        assert lending.ok and "each node lends 2.0 GiB to it" in lending.detail


def test_what_is_lent_and_the_buffer_are_memory_that_is_needed():
    section = {"global_segment_size": ByteSize(2 << 30), "in_flight": ByteSize(1 << 30)}
    (memory,) = check_memory(Context(config_of(**section)))
    assert "1.0 GiB of it segments, 3.0 GiB for Mooncake" in memory.detail
    section["global_segment_size"] = ByteSize(1 << 50)
    (memory,) = check_memory(Context(config_of(**section)))
    assert not memory.ok and "tiers.mooncake.global_segment_size" in memory.remedy


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({}, None),
        ({"master": "[::1]:50051"}, None),
        ({"master": "host"}, "tiers.mooncake.master: host: expected HOST:PORT"),
        ({"master": "http://host:1"}, "expected HOST:PORT"),
        ({"master": "host:0"}, "expected HOST:PORT"),
        ({"ttl_s": 3.0}, "tiers.mooncake.ttl_s: Mooncake gives no key a time of its own"),
        ({"rdma_devices": ["mlx5_0"]}, "they are of protocol rdma, and it is tcp"),
    ],
)
def test_what_cannot_be_is_refused_in_the_file(section, problem):
    problems = check_cluster(config_of(**section))
    assert problems == [] if problem is None else problem in problems[0] and len(problems) == 1
