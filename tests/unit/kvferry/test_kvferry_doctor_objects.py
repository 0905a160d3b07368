"""The doctor writes, reads and removes an object where chunks are to be kept."""

import msgspec
import pytest
from support.s3_server import S3Server, s3_server, with_s3

from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, SimEngineConfig
from kvcore.config.tiers import ObjectTierConfig, TiersConfig
from kvcore.types import Role
from kvferry.doctor.checks import ALL_CHECKS
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.objects import check_objects

CONFIG = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="m", name="m"),
    engine=SimEngineConfig(),
    nodes={"d0": NodeConfig(role=Role.DECODER, host="127.0.0.1", port=8712)},
)


def finding_for(config: ObjectTierConfig) -> Finding:
    (finding,) = check_objects(Context(msgspec.structs.replace(CONFIG, tiers=TiersConfig(object=config))))
    return finding


def test_no_objects_need_no_check():
    assert check_objects(Context(CONFIG)) == [] and check_objects in ALL_CHECKS


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path):
    finding = finding_for(ObjectTierConfig(url=f"file://{tmp_path}/kv"))
    assert finding.ok and finding.detail.startswith(f"file://{tmp_path}/kv: written, read and removed")
    assert "delete old files" in finding.detail and list((tmp_path / "kv").iterdir()) == []


def test_a_folder_that_cannot_be_and_a_url_that_is_none_are_wrong(tmp_path):
    (tmp_path / "file").touch()
    finding = finding_for(ObjectTierConfig(url=f"file://{tmp_path}/file/kv"))
    assert not finding.ok and "Not a directory" in finding.detail
    assert not finding_for(ObjectTierConfig(url="ftp://host")).ok


@with_s3
def test_a_bucket_is_tried_and_what_is_wrong_with_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server.credentials.items():
        monkeypatch.setenv(name, value)
    with s3_server() as server:
        there = ObjectTierConfig(url=f"s3://{server.make_bucket()}/p", endpoint=server.url, timeout_s=2.0)
        finding = finding_for(there)
        assert finding.ok and "lifecycle rule" in finding.detail
        finding = finding_for(msgspec.structs.replace(there, url="s3://another"))
        assert not finding.ok and finding.detail == "s3://another: there is no such bucket"
        server.freeze()
        finding = finding_for(msgspec.structs.replace(there, timeout_s=0.2))
        assert not finding.ok and "did not answer in time" in finding.detail
        server.stop()
        finding = finding_for(there)
        assert not finding.ok and "refused" in finding.detail and "tiers.object" in finding.remedy
