"""The doctor asks a Redis whether it is there, and whether it is set up as a cache."""

import msgspec
import pytest
from support.ports import free_ports
from support.redis_groups import cluster_group, sentinel_group
from support.redis_server import redis_server, with_redis

from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, SimEngineConfig
from kvcore.config.tiers import RedisTierConfig, TiersConfig
from kvcore.types import Role
from kvferry.doctor.checks import ALL_CHECKS
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.tiers import check_redis

CONFIG = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="m", name="m"),
    engine=SimEngineConfig(),
    nodes={"d0": NodeConfig(role=Role.DECODER, host="127.0.0.1", port=8712)},
)


def finding_for(url: str) -> Finding:
    config = msgspec.structs.replace(CONFIG, tiers=TiersConfig(redis=RedisTierConfig(url=url)))
    (finding,) = check_redis(Context(config))
    return finding


def test_no_redis_needs_no_check():
    assert check_redis(Context(CONFIG)) == [] and check_redis in ALL_CHECKS


def test_one_that_is_away_or_cannot_be_is_wrong():
    away = finding_for(f"redis://:secret@127.0.0.1:{free_ports(1)[0]}")
    assert not away.ok and "refused" in away.detail and "tiers.redis.url" in away.remedy
    assert "secret" not in away.detail
    assert not finding_for("redis-sentinel://h").ok
    port = free_ports(1)[0]
    assert "no sentinel knows a master of kv" in finding_for(f"redis-sentinel://127.0.0.1:{port}/kv").detail
    assert "none of its nodes" in finding_for(f"redis-cluster://127.0.0.1:{port}").detail


@pytest.mark.parametrize(
    ("args", "warnings"),
    [
        ((), []),
        (("--maxmemory-policy", "allkeys-lfu"), []),
        (("--maxmemory", "0"), ["set its maxmemory,"]),
        (("--maxmemory-policy", "noeviction"), ["set its maxmemory-policy to allkeys-lru or allkeys-lfu"]),
        (("--maxmemory", "0", "--maxmemory-policy", "volatile-ttl"), ["set its maxmemory,", "-policy to allkeys"]),
        (("--requirepass", "sesame"), None),
        (("--user", "default", "on", "nopass", "+ping"), ["NOPERM"]),
    ],
)
@with_redis
def test_what_it_is_set_to(args, warnings):
    with redis_server(*args) as server:
        finding = finding_for(server.url)
        if warnings is None:
            assert not finding.ok and "NOAUTH" in finding.detail
            return
        assert finding.ok and finding.detail.startswith(f"{server.url}/0: ")
        if warnings == ["NOPERM"]:
            assert "NOPERM" in finding.detail and "are not known" in finding.detail
            return
        assert "version " in finding.detail and finding.detail.count("warning: ") == len(warnings)
        assert all(warning in finding.detail for warning in warnings)


@with_redis
def test_each_master_of_a_cluster_is_asked_and_that_of_sentinels():
    with cluster_group() as nodes:
        config = msgspec.structs.replace(CONFIG, tiers=TiersConfig(redis=RedisTierConfig(url=nodes.url)))
        findings = check_redis(Context(config))
        assert [finding.ok for finding in findings] == [True] * 3
        assert {one.detail.partition(":")[0] for one in findings} == {"redis"}
        assert all("maxmemory 64.0 MiB, maxmemory-policy allkeys-lru" in finding.detail for finding in findings)
    with sentinel_group() as group:
        finding = finding_for(group.url)
        assert finding.ok and group.master.url in finding.detail
