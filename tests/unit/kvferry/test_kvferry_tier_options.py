"""`--tier` of `kvferry serve`."""

from pathlib import Path

import pytest

from kvcore.config.checks import check_cluster
from kvcore.config.file import load_config
from kvcore.config.tiers import DiskTierConfig, MooncakeTierConfig, ObjectTierConfig, RedisTierConfig, TiersConfig
from kvcore.errors import ConfigError
from kvferry import cli, serve
from kvferry.cluster_text import cluster_text
from kvferry.serve_plan import Machine, ServeOptions, plan_cluster
from kvferry.tier_options import parse_tier, parse_tiers, shown

GIB = 1 << 30


def machine() -> Machine:
    return Machine(cores=(0, 1), gpus=(), memory_bytes=16 * GIB, vllm=None, has_torch=True)


@pytest.mark.parametrize(
    ("text", "tier"),
    [
        ("disk:/nvme/kvferry:200GiB", DiskTierConfig(path="/nvme/kvferry", size=200 * GIB)),
        ("disk:/a:b/c:1.5 GiB", DiskTierConfig(path="/a:b/c", size=3 * GIB // 2)),
        ("disk:~/k:5MB", DiskTierConfig(path=str(Path.home() / "k"), size=5_000_000)),
        ("disk:here:1GiB", DiskTierConfig(path=str(Path.cwd() / "here"), size=GIB)),
        ("redis://cache:6379", RedisTierConfig(url="redis://cache:6379")),
        ("rediss://u:p@cache/3", RedisTierConfig(url="rediss://u:p@cache/3")),
        ("redis://[::1]:6379", RedisTierConfig(url="redis://[::1]:6379")),
        *((url, ObjectTierConfig(url=url)) for url in ("s3://b-1/some/prefix", "gs://b", "az://c/p", "file:///a%20b")),
        ("mooncake://m:50052", MooncakeTierConfig(master="m:50052")),
        ("mooncakestore://10.0.0.1:50051/", MooncakeTierConfig(master="10.0.0.1:50051")),
        ("mooncake://m", MooncakeTierConfig(master="m:50051")),
        ("mooncake://[::1]:9", MooncakeTierConfig(master="[::1]:9")),
    ],
)
def test_a_tier_is_written_as_one_word(text, tier):
    assert parse_tier(text) == tier


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("disk:/nvme", "--tier disk:/nvme: expected disk:PATH:SIZE"),
        ("disk::1GiB", "expected disk:PATH:SIZE"),
        ("disk", "expected disk:PATH:SIZE"),
        ("disk:/nvme:much", "'much': expected a positive number of bytes such as 512MiB.*disk:PATH:SIZE"),
        ("disk:/nvme:0", "expected a positive number of bytes"),
        ("redis://", "it names no host; expected redis://"),
        ("redis:cache:6379", "it names no host"),
        ("redis://cache:99999", "host or port cannot be read"),
        ("redis://cache:0", "nothing listens on port 0"),
        ("redis://cache:6379/kv", "/kv is no number of a database"),
        ("s3://", "--tier: 's3://' names no bucket; expected s3://BUCKET/PREFIX"),
        ("s3://bucket/a//b", "'a//b': a prefix is made of"),
        ("s3://bucket/a/../b", "'a/../b': a prefix is made of"),
        ("s3://bucket?x=1", "is no place for objects"),
        ("file://host/a", "is no absolute path"),
        ("file:///", "is no absolute path"),
        ("mooncake://", "expected mooncake://HOST:PORT, of mooncake_master"),
        ("mooncake://m:0", "expected mooncake://HOST:PORT"),
        ("mooncake://m:99999", "host or port cannot be read"),
        ("mooncake://u@m:1", "expected mooncake://HOST:PORT"),
        ("reddis://cache", r"unknown kind 'reddis' \(did you mean redis\?\); expected disk:PATH:SIZE"),
        ("/nvme", "unknown kind"),
    ],
)
def test_what_is_no_tier_is_refused_with_what_is_expected(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_tier(text)


def test_no_password_is_shown():
    assert shown("rediss://me:secret@cache:6379/1") == "rediss://me:***@cache:6379/1"
    assert shown("redis://cache") == "redis://cache"
    for text in (
        "redis://me:secret@cache:99999",
        "redis://me:secret@[::1",
        "redis://:secret@:6379",
        "s3://me:secret@b",
    ):
        with pytest.raises(ConfigError) as refused:
            parse_tier(text)
        assert "secret" not in str(refused.value)


def test_there_is_one_tier_of_each_kind():
    disk, redis, mooncake = "disk:/nvme:1GiB", "redis://cache:6379", "mooncake://m:1"
    all_of_them = TiersConfig(
        disk=DiskTierConfig(path="/nvme", size=GIB),
        redis=RedisTierConfig(url=redis),
        mooncake=MooncakeTierConfig(master="m:1"),
    )
    assert parse_tiers([disk, redis, mooncake]) == all_of_them
    assert parse_tiers([]) == TiersConfig()
    with pytest.raises(ConfigError, match="there is a disk tier already"):
        parse_tiers([disk, redis, disk])


def test_the_planned_cluster_has_the_tiers_and_its_text_too(tmp_path):
    tiers = parse_tiers(["disk:/nvme:1GiB", "redis://cache:6379", "mooncake://m:1"])
    config, _ = plan_cluster(ServeOptions(folder="/m", name="m", tiers=tiers), machine())
    assert check_cluster(config) == [] and config.tiers == tiers
    (tmp_path / "cluster.yaml").write_text(cluster_text(config))
    assert load_config(tmp_path / "cluster.yaml").tiers == tiers


def test_the_command_takes_tiers_and_says_what_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(serve, "this_machine", machine)
    monkeypatch.setattr("kvferry.doctor.checks.preflight", lambda config: None)
    monkeypatch.setattr("kvferry.launch.up.run_up", lambda *given: 0)
    (tmp_path / "m").mkdir()
    tiers = ["--tier", "disk:/nvme:3GiB", "--tier", "redis://:secret@cache:6379", "--tier", "s3://b/p"]
    tiers += ["--tier", "mooncake://m:1"]
    assert cli.main(["serve", str(tmp_path / "m"), *tiers]) == 0
    file = tmp_path / "kvferry/serve-m/cluster.yaml"
    assert load_config(file).tiers == parse_tiers(tiers[1::2])
    assert file.stat().st_mode & 0o777 == 0o600, "it has the password"
    out = capsys.readouterr().out
    assert "disk tier: 3GiB of each node, in /nvme\n" in out and "redis tier: redis://:***@cache:6379\n" in out
    assert "object tier: s3://b/p\n" in out
    assert "mooncake tier: m:1, lent nothing (tiers.mooncake.global_segment_size)\n" in out
    assert cli.main(["serve", str(tmp_path / "m"), "--tier", "tape:/dev/st0"]) == 2
    assert "--tier tape:/dev/st0: unknown kind 'tape'" in capsys.readouterr().err
