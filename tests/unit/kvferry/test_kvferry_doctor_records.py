"""The doctor says where records lie and whether they can be written."""

from pathlib import Path

import msgspec
import pytest
from support.etcd_server import etcd_server, with_etcd
from support.ports import free_ports

from kvcore.clock import SystemClock
from kvcore.config.partitions import PartitionConfig
from kvcore.config.records import EtcdRecordsConfig, MemoryRecordsConfig, RecordsConfig, SqliteRecordsConfig
from kvcore.config.schema import ClusterConfig, MetadataServerConfig, ModelConfig, NodeConfig, SimEngineConfig
from kvcore.errors import ConfigError
from kvcore.state_folder import state_folder
from kvcore.types import Role
from kvferry.doctor.checks import ALL_CHECKS
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.records import check_records
from metadata_server.records.opening import open_records

CONFIG = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="m", name="m"),
    engine=SimEngineConfig(),
    nodes={"d0": NodeConfig(role=Role.DECODER, host="127.0.0.1", port=8712)},
)


def config_for(records: RecordsConfig, **server: object) -> ClusterConfig:
    kept = MetadataServerConfig(**{"host": "127.0.0.1", "records": records, **server})  # type: ignore[arg-type]
    return msgspec.structs.replace(CONFIG, metadata_server=kept)


def finding_for(records: RecordsConfig, **server: object) -> Finding:
    (finding,) = check_records(Context(config_for(records, **server)))
    return finding


def test_it_is_among_the_checks_of_the_machine_that_runs_the_metadata_server():
    assert check_records in ALL_CHECKS
    assert check_records(Context(config_for(SqliteRecordsConfig(), host="192.0.2.1"))) == []


def test_records_in_memory_are_said_to_end():
    assert "in memory" in finding_for(MemoryRecordsConfig()).detail
    assert "port is 0" in finding_for(SqliteRecordsConfig(), port=0).detail


async def test_a_file_is_named_and_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    finding = finding_for(SqliteRecordsConfig(), port=8700)
    file = tmp_path / "kvferry" / "c" / "records-8700.sqlite"
    assert finding.ok and finding.detail == f"{file}, which will be made" and list(tmp_path.iterdir()) == []
    records = await open_records(config_for(SqliteRecordsConfig(), port=8700), SystemClock())
    assert file.exists() and finding_for(SqliteRecordsConfig(), port=8700).detail == str(file)  # held, and not touched
    await records.aclose()


def test_what_cannot_be_written_is_wrong(tmp_path):
    (tmp_path / "file").touch()
    finding = finding_for(SqliteRecordsConfig(path=str(tmp_path / "file" / "records.sqlite")))
    assert not finding.ok and f"{tmp_path / 'file'} cannot be written" in finding.detail
    assert "metadata_server.records" in finding.remedy


def test_members_of_etcd_that_do_not_answer_are_wrong():
    (port,) = free_ports(1)
    finding = finding_for(EtcdRecordsConfig(endpoints=[f"http://127.0.0.1:{port}"], timeout_s=0.1))
    assert not finding.ok and finding.detail.startswith(f"etcd at 127.0.0.1:{port}, below kvferry/c/: ")
    assert "unavailable" in finding.detail or "deadline exceeded" in finding.detail
    assert not finding_for(EtcdRecordsConfig(endpoints=["nowhere"])).ok


def test_each_partition_is_tried_where_its_own_server_keeps_its_records():
    (port,) = free_ports(1)
    parts = [PartitionConfig(name=name, host="127.0.0.1", port=8700 + at) for at, name in enumerate("ab")]
    records = EtcdRecordsConfig(endpoints=[f"http://127.0.0.1:{port}"], timeout_s=0.1)
    findings = check_records(Context(config_for(records, partitions=parts)))
    below = [finding.detail.partition(", below ")[2].partition(":")[0] for finding in findings]
    assert below == ["kvferry/c/parts/a/", "kvferry/c/parts/b/"], "there its janitor looks for what a doctor left"


@with_etcd
def test_each_member_of_etcd_is_written_to_and_left_as_it_was():
    with etcd_server(3) as server:
        finding = finding_for(EtcdRecordsConfig(endpoints=server.urls, timeout_s=10.0))
        assert finding.ok and finding.detail.endswith(", below kvferry/c/"), finding
        assert server.ctl("get", "--prefix", "kvferry/") == ""
        server.members[2].stop()
        finding = finding_for(EtcdRecordsConfig(endpoints=server.urls, timeout_s=1.0))
        assert not finding.ok and str(server.members[2].port) in finding.detail.partition(": ")[2]


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", refuse)
    with pytest.raises(ConfigError, match="XDG_STATE_HOME"):
        state_folder("c")
    finding = finding_for(SqliteRecordsConfig(), port=8700)
    assert not finding.ok and "no home folder" in finding.detail
