"""LMCache's file and environment as a part of our cluster file: every key, and the files that its users copy."""

import re
from pathlib import Path

import pytest
import yaml
from support.lmcache_files import MOONCAKE_PREFILLER, NATIVE, TUTORIAL

from kvcore.config.file import load_config
from kvcore.config.tiers import DiskTierConfig, MooncakeTierConfig, RedisTierConfig, TiersConfig
from kvcore.errors import ConfigError
from kvferry import cli, serve
from kvferry.doctor.checks import preflight
from kvferry.doctor.transports import check_transports
from kvferry.lmcache.draft import Draft, Fate
from kvferry.lmcache.importer import read_lmcache
from kvferry.lmcache.keys import RULES
from kvferry.serve_plan import Machine

GIB = 1 << 30
DOCS = Path(__file__).parents[3] / "docs"
Case = tuple[dict[str, object], str, Fate, str, dict[str, object]]
MAPPED, IGNORED, REFUSED = Fate.MAPPED, Fate.IGNORED, Fate.REFUSED


def both(**node: object) -> dict[str, object]:
    return {
        "nodes": {
            "prefill-0": {"role": "prefiller", "port": 8100, **node},
            "decode-0": {"role": "decoder", "port": 8200, **node},
        }
    }


def disk(path: str, size: str) -> dict[str, object]:
    return {"tiers": {"disk": {"path": path, "size": size}}}


def redis(url: str, **more: object) -> dict[str, object]:
    return {"tiers": {"redis": {"url": url, **more}}}


def mooncake(**section: object) -> dict[str, object]:
    return {"tiers": {"mooncake": {"master": "m:1", "global_segment_size": "3200MiB", **section}}}


def of_mooncake(name: str, value: object, word: str, part: dict[str, object], *, own: str = "") -> list[Case]:
    """In each of its spellings; without a Mooncake it says nothing."""
    url = {"remote_url": "mooncakestore://m:1"}
    cases: list[Case] = []
    for inner in (name, f"mooncake_{own or name}"):
        cases.append(({**url, "extra_config": {inner: value}}, f"extra_config.{inner}", MAPPED, word, part))
        cases.append(({"extra_config": {inner: value}}, f"extra_config.{inner}", IGNORED, "no mooncakestore://", {}))
    cases.append(({**url, name: value}, name, MAPPED, f"{word}.*; LMCache itself ignores this key", part))
    return cases


MOONCAKE_CASES: list[Case] = [
    ({"remote_url": "mooncakestore://m:1/"}, "remote_url", MAPPED, "LMCache itself takes no host", mooncake()),
    ({"remote_url": "mooncakestore://m:1"}, "remote_url", MAPPED, "each node lends 3200MiB", mooncake()),
    ({"remote_url": "mooncakestore://"}, "remote_url", REFUSED, "expected mooncake://HOST:PORT", {}),
    *of_mooncake("local_hostname", "10.0.0.7", "local_hostname: 10.0.0.7", mooncake(local_hostname="10.0.0.7")),
    *of_mooncake("metadata_server", "http://m/metadata", "http", mooncake(metadata_server="http://m/metadata")),
    *of_mooncake("master_server_address", "n:2", "master: n:2", mooncake(master="n:2"), own="master_server_addr"),
    *of_mooncake("global_segment_size", 4 << 30, "4GiB, of each node", mooncake(global_segment_size="4GiB")),
    *of_mooncake("local_buffer_size", "1 GB", "1GB, of each node", mooncake(local_buffer_size="1GB")),
    *of_mooncake("transfer_timeout", 3, "timeout_s: 3", mooncake(timeout_s=3.0)),
    (
        {"remote_url": "mooncakestore://m:1", "global_segment_size": 0},
        "global_segment_size",
        MAPPED,
        "not set: none",
        {"tiers": {"mooncake": {"master": "m:1"}}},
    ),
    (
        {"remote_url": "mooncakestore://m:1", "extra_config": {"global_segment_size": "much"}},
        "extra_config.global_segment_size",
        REFUSED,
        "'much': expected a positive number",
        {"tiers": {"mooncake": {"master": "m:1"}}},
    ),
    (
        {"remote_url": "mooncakestore://m:1", "extra_config": {"transfer_timeout": 0}},
        "extra_config.transfer_timeout",
        REFUSED,
        "expected more",
        mooncake(),
    ),
    ({"remote_url": "mooncakestore://m:1", "metadata_server": ""}, "metadata_server", IGNORED, "empty", mooncake()),
    (
        {"remote_url": "mooncakestore:///", "extra_config": {"master_server_address": "n:2"}},
        "remote_url",
        MAPPED,
        "master: n:2",
        mooncake(master="n:2"),
    ),
    (
        {"remote_url": "mooncakestore://m:1", "extra_config": {"mooncake_local_hostname": "a", "local_hostname": "b"}},
        "extra_config.local_hostname",
        MAPPED,
        "local_hostname: a",
        mooncake(local_hostname="a"),
    ),
    (
        {"remote_url": "mooncakestore://m:1", "blocking_timeout_secs": 4},
        "blocking_timeout_secs",
        MAPPED,
        "tiers.mooncake",
        mooncake(timeout_s=4.0),
    ),
    (
        {"remote_url": "mooncakestore://m:1", "blocking_timeout_secs": 4, "extra_config": {"transfer_timeout": 1}},
        "blocking_timeout_secs",
        IGNORED,
        "transfer_timeout is given",
        mooncake(timeout_s=1.0),
    ),
    (
        {
            "remote_url": "mooncakestore://m:1",
            "extra_config": {"mooncake_protocol": "rdma", "mooncake_rdma_devices": "mlx5_0,mlx5_1"},
        },
        "extra_config.mooncake_rdma_devices",
        MAPPED,
        "transport.devices, and tiers.mooncake.rdma_devices: mlx5_0, mlx5_1",
        {
            "transport": {"kind": "ucx", "devices": ["mlx5_0", "mlx5_1"]},
            **mooncake(protocol="rdma", rdma_devices=["mlx5_0", "mlx5_1"]),
        },
    ),
    (
        {"remote_url": "mooncakestore://m:1", "extra_config": {"mooncake_protocol": "tcp"}},
        "extra_config.mooncake_protocol",
        IGNORED,
        "TCP between hosts",
        mooncake(),
    ),
]

# the file, the key in question, its fate, a word of its note, the part that comes of all
CASES: list[Case] = [
    ({"chunk_size": 512}, "chunk_size", MAPPED, "kv.chunk_tokens: 512", {"kv": {"chunk_tokens": 512}}),
    ({"chunk_size": "128"}, "chunk_size", MAPPED, "128", {"kv": {"chunk_tokens": 128}}),
    ({"chunk_size": 128.0}, "chunk_size", MAPPED, "128", {"kv": {"chunk_tokens": 128}}),
    ({"chunk_size": 0}, "chunk_size", REFUSED, "0 is no whole number from 1", {}),
    ({"chunk_size": True}, "chunk_size", REFUSED, "no whole number", {}),
    ({"chunk_size": None}, "chunk_size", IGNORED, "empty", {}),
    ({"local_cpu": True}, "local_cpu", IGNORED, "in any case", {}),
    ({"local_cpu": "yes"}, "local_cpu", MAPPED, "only true and 1 are true", both(segment="256MiB")),
    ({"local_cpu": False, "max_local_cpu_size": 8}, "local_cpu", MAPPED, "smallest", both(segment="256MiB")),
    ({"local_cpu": False, "max_local_cpu_size": 8}, "max_local_cpu_size", IGNORED, "false", both(segment="256MiB")),
    ({"max_local_cpu_size": 8}, "max_local_cpu_size", MAPPED, "8GiB, of each node", both(segment="8GiB")),
    ({"max_local_cpu_size": 0.5}, "max_local_cpu_size", MAPPED, "512MiB", both(segment="512MiB")),
    ({"max_local_cpu_size": 0}, "max_local_cpu_size", MAPPED, "256MiB", both(segment="256MiB")),
    ({"max_local_cpu_size": "10GB"}, "max_local_cpu_size", MAPPED, "LMCache reads no unit", both(segment="10GB")),
    ({"max_local_cpu_size": "8 GiB"}, "max_local_cpu_size", MAPPED, "reads no unit", both(segment="8GiB")),
    ({"max_local_cpu_size": "lots"}, "max_local_cpu_size", REFUSED, "no number of GiB", {}),
    ({"max_local_cpu_size": -1}, "max_local_cpu_size", REFUSED, "no number of GiB", {}),
    ({"max_local_cpu_size": 10_737_418_240}, "max_local_cpu_size", REFUSED, "no number of GiB", {}),
    ({"local_cpu_use_hugepages": 1}, "local_cpu_use_hugepages", MAPPED, "true", both(hugepages=True)),
    ({"numa_mode": "auto"}, "numa_mode", IGNORED, "numa_node", {}),
    (
        {"numa_mode": "manual", "extra_config": {"gpu_to_numa_mapping": {0: 1, 1: 1}}},
        "numa_mode",
        MAPPED,
        "numa_node: 1",
        both(numa_node=1),
    ),
    ({"extra_config": {"gpu_to_numa_mapping": {0: 1}}}, "extra_config.gpu_to_numa_mapping", IGNORED, "numa_mode", {}),
    ({"local_disk": "file:///a/", "max_local_disk_size": 5}, "local_disk", MAPPED, ": /a/", disk("/a/", "5GiB")),
    ({"local_disk": "/a", "max_local_disk_size": "5GB"}, "max_local_disk_size", MAPPED, "5GB", disk("/a", "5GB")),
    ({"local_disk": "/a"}, "local_disk", IGNORED, "in LMCache either", {}),
    ({"local_disk": ""}, "local_disk", IGNORED, "no path", {}),
    ({"max_local_disk_size": 5}, "max_local_disk_size", IGNORED, "no local_disk", {}),
    ({"max_local_disk_size": 0}, "max_local_disk_size", IGNORED, "no disk tier", {}),
    (
        {"local_disk": "file:///a/,file:///b/", "max_local_disk_size": 1},
        "local_disk",
        MAPPED,
        "/a/, /b/, node by node",
        {
            "nodes": {
                "prefill-0": {"role": "prefiller", "port": 8100, "disk": {"path": "/a/", "size": "1GiB"}},
                "decode-0": {"role": "decoder", "port": 8200, "disk": {"path": "/b/", "size": "1GiB"}},
            }
        },
    ),
    ({"remote_url": "redis://c:6379"}, "remote_url", MAPPED, "redis://c:6379", redis("redis://c:6379")),
    ({"remote_url": "rediss://:pw@c"}, "remote_url", MAPPED, "rediss://:...@c$", redis("rediss://:pw@c")),
    ({"remote_url": "resp://c:1"}, "remote_url", MAPPED, "redis://c:1", redis("redis://c:1")),
    ({"remote_url": "valkey://c:1"}, "remote_url", MAPPED, "redis://c:1", redis("redis://c:1")),
    ({"remote_url": "redis://a:1,b:2"}, "remote_url", REFUSED, "redis-sentinel:// or redis-cluster://", {}),
    *(
        ({"remote_url": url}, "remote_url", MAPPED, said, redis(url))
        for url, said in [
            ("redis-sentinel://u:pw@a:1,b:2/main", "redis-sentinel://u:...@a:1,b:2/main$"),
            ("redis-sentinel://a:1,b:2", "a:1,b:2, its service is REDIS_SERVICE_NAME of the environment"),
            ("redis-cluster://a:1,b:2", "redis-cluster://a:1,b:2$"),
        ]
    ),
    ({"remote_url": "redis-cluster://a:x"}, "remote_url", REFUSED, "names no server; write redis-cluster", {}),
    ({"remote_url": "redis://"}, "remote_url", REFUSED, "names no host", {}),
    ({"remote_url": "cache:6379"}, "remote_url", REFUSED, "no URL", {}),
    *(
        ({"remote_url": f"{scheme}://h:1"}, "remote_url", REFUSED, f"no tier for {scheme}://; nearest: .*{near}", {})
        for scheme, near in {
            "lm": "metadata server",
            "infinistore": "RDMA",
            "blackhole": "redis://HOST:PORT, or a disk",
        }.items()
    ),
    *(
        ({"remote_url": url, "extra_config": extra}, "remote_url", MAPPED, part["url"], {"tiers": {"object": part}})
        for url, extra, part in [
            ("s3://b.s3.eu-west-1.amazonaws.com", {}, {"region": "eu-west-1", "url": "s3://b"}),
            ("s3://a.b.s3.us-east-2.amazonaws.com/p/", {}, {"region": "us-east-2", "url": "s3://a.b/p"}),
            ("s3://b.s3.r-1.amazonaws.com", {"s3_region": "r-2"}, {"region": "r-2", "url": "s3://b"}),
            ("s3://b.minio:9000", {"disable_tls": True}, {"endpoint": "http://minio:9000", "url": "s3://b"}),
            ("s3://b.store.example", {}, {"endpoint": "https://store.example", "url": "s3://b"}),
            ("s3://b", {"s3_region": "r-1"}, {"region": "r-1", "url": "s3://b"}),
            ("fs:///mnt/kv", {}, {"url": "file:///mnt/kv"}),
            ("fs://host:1/mnt/kv", {}, {"url": "file:///mnt/kv"}),
        ]
    ),
    *(
        ({"remote_url": url}, "remote_url", REFUSED, said, {})
        for url, said in [
            ("s3://b--x-s3.s3express-use1-az4.us-east-1.amazonaws.com", "S3 Express.*nearest: an ordinary bucket"),
            ("s3://", "names no bucket"),
            ("s3://key:secret@b.s3.r-1.amazonaws.com", "a user or a password; credentials are taken"),
            ("fs:///a,/b", "several folders; nearest"),
            ("fs://host", "no absolute path"),
        ]
    ),
    (
        {"extra_config": {"aws_secret_access_key": "secret"}},
        "extra_config.aws_secret_access_key",
        IGNORED,
        "AWS_SECRET_ACCESS_KEY in the environment",
        {},
    ),
    (
        {"blocking_timeout_secs": 3, "remote_url": "fs:///kv"},
        "blocking_timeout_secs",
        MAPPED,
        "tiers.object.timeout_s: 3",
        {"tiers": {"object": {"timeout_s": 3.0, "url": "file:///kv"}}},
    ),
    ({"storage": {"type": "redis", "host": "c", "port": 7}}, "storage", MAPPED, "LMCache itself", redis("redis://c:7")),
    ({"storage": {"type": "redis", "host": "::1"}}, "storage", MAPPED, "6379", redis("redis://[::1]:6379")),
    ({"storage": {"type": "disk"}}, "storage", REFUSED, "type is disk; nearest: remote_url", {}),
    ({"storage": "redis"}, "storage", REFUSED, "nearest: remote_url", {}),
    (
        {"storage": {"type": "redis"}, "remote_url": "redis://c:1"},
        "storage",
        IGNORED,
        "remote_url is given",
        redis("redis://c:1"),
    ),
    ({"remote_serde": "naive"}, "remote_serde", IGNORED, "as they are", {}),
    ({"remote_serde": "kivi"}, "remote_serde", IGNORED, "as they are, as LMCache does with kivi", {}),
    ({"remote_serde": "CacheGen"}, "remote_serde", IGNORED, "cachegen is lossy;.*codec: int8", {}),
    ({"remote_serde": "torch"}, "remote_serde", REFUSED, "none of naive, kivi and cachegen", {}),
    ({"min_retrieve_tokens": 512}, "min_retrieve_tokens", IGNORED, "decided by measured rates", {}),
    ({"save_decode_cache": False}, "save_decode_cache", MAPPED, "false", {"engine": {"save_output": False}}),
    ({"save_decode_cache": "1"}, "save_decode_cache", MAPPED, "true", {"engine": {"save_output": True}}),
    ({"save_unfull_chunk": True}, "save_unfull_chunk", IGNORED, "only full chunks .*nearest: a smaller chunk_size", {}),
    ({"save_unfull_chunk": False}, "save_unfull_chunk", IGNORED, "only full chunks are found again, as it asks", {}),
    ({"cache_policy": "lru"}, "cache_policy", MAPPED, "lru", {"store": {"eviction": "lru"}}),
    ({"cache_policy": "LFU"}, "cache_policy", MAPPED, "lfu", {"store": {"eviction": "lfu"}}),
    ({"cache_policy": "FIFO"}, "cache_policy", MAPPED, "fifo", {"store": {"eviction": "fifo"}}),
    ({"cache_policy": "ARC"}, "cache_policy", MAPPED, "arc", {"store": {"eviction": "arc"}}),
    ({"cache_policy": "MRU"}, "cache_policy", REFUSED, "nearest: LRU", {}),
    (
        {"blocking_timeout_secs": 10, "remote_url": "redis://c:1"},
        "blocking_timeout_secs",
        MAPPED,
        "10",
        redis("redis://c:1", timeout_s=10.0),
    ),
    (
        {"blocking_timeout_secs": 10, "storage": {"type": "redis", "host": "c"}},
        "blocking_timeout_secs",
        MAPPED,
        "10",
        redis("redis://c:6379", timeout_s=10.0),
    ),
    ({"blocking_timeout_secs": 10}, "blocking_timeout_secs", IGNORED, "no remote store", {}),
    ({"blocking_timeout_secs": 0}, "blocking_timeout_secs", REFUSED, "expected more", {}),
    ({"lookup_timeout_ms": 3000}, "lookup_timeout_ms", MAPPED, "wait_s: 3,", {"tiers": {"wait_s": 3.0}}),
    ({"lookup_timeout_ms": 0}, "lookup_timeout_ms", REFUSED, "expected more", {}),
    (
        {"enable_pd": True, "pd_role": "sender"},
        "pd_role",
        MAPPED,
        "prefiller",
        {"nodes": {"prefill-0": {"role": "prefiller", "port": 8100}}},
    ),
    (
        {"enable_xpyd": True, "nixl_role": "receiver"},
        "nixl_role",
        MAPPED,
        "decoder.*LMCache itself ignores",
        {"nodes": {"decode-0": {"role": "decoder", "port": 8200}}},
    ),
    ({"enable_pd": True, "pd_role": "both"}, "pd_role", MAPPED, "a prefiller and a decoder", {}),
    ({"enable_pd": True, "pd_role": "king"}, "pd_role", REFUSED, "expected sender", {}),
    ({"pd_role": "sender"}, "pd_role", IGNORED, "enable_pd is not true", {}),
    ({"enable_pd": True}, "enable_pd", IGNORED, "pd_role", {}),
    ({"extra_config": {"protocol": "rdma"}}, "extra_config.protocol", MAPPED, "ucx", {"transport": {"kind": "ucx"}}),
    ({"extra_config": {"protocol": "tcp"}}, "extra_config.protocol", IGNORED, "shared memory", {}),
    ({"extra_config": {"protocol": "ascend"}}, "extra_config.protocol", REFUSED, "nearest: tcp", {}),
    ({"protocol": "rdma"}, "protocol", MAPPED, "itself ignores this key", {"transport": {"kind": "ucx"}}),
    (
        {"extra_config": {"protocol": "rdma", "device_name": "mlx5_0, mlx5_1"}},
        "extra_config.device_name",
        MAPPED,
        "mlx5_0, mlx5_1",
        {"transport": {"kind": "ucx", "devices": ["mlx5_0", "mlx5_1"]}},
    ),
    (
        {"protocol": "rdma", "device_name": "mlx5_0"},
        "device_name",
        MAPPED,
        "mlx5_0",
        {"transport": {"kind": "ucx", "devices": ["mlx5_0"]}},
    ),
    ({"extra_config": {"device_name": "eth0"}}, "extra_config.device_name", IGNORED, "not rdma", {}),
    *MOONCAKE_CASES,
    ({"enable_blending": True}, "enable_blending", REFUSED, "beginning of a prompt", {}),
    ({"enable_blending": "yes"}, "enable_blending", IGNORED, "off", {}),
    ({"gds_path": "/g"}, "gds_path", REFUSED, "nearest: a disk", {}),
    ({"gds_path": ""}, "gds_path", IGNORED, "off", {}),
    ({"external_backends": ["x"]}, "external_backends", REFUSED, "plugins", {}),
    ({"external_backends": []}, "external_backends", IGNORED, "off", {}),
    ({"chunk_sise": 3}, "chunk_sise", IGNORED, "no such key.*did you mean chunk_size", {}),
    ({"qqqqqqq": 3}, "qqqqqqq", IGNORED, "no such key and ignores it$", {}),
]


def note_of(draft: Draft, key: str) -> tuple[Fate, str]:
    (note,) = [note for note in draft.notes if note.key == key]
    return note.fate, note.text


@pytest.mark.parametrize(("given", "key", "fate", "word", "part"), CASES)
def test_a_key_becomes_what_the_table_says(given, key, fate, word, part):
    draft = read_lmcache(yaml.safe_dump(given), {})
    found, text = note_of(draft, key)
    assert found is fate and re.search(word, text), text
    assert draft.whole() == part


def test_every_row_of_the_table_is_tried_or_says_the_same_of_all_its_keys():
    """Rows that map have a case each; the others are tried with every name that they have."""
    tried = {key for _, key, *_ in CASES}
    for rule in RULES:
        if rule.becomes.startswith(("ignored: ", "refused, unless")):
            for name in rule.names:
                key = name.replace("*", "some")
                section, _, inner = key.rpartition(".")
                given = {section: {inner: "true"}} if section else {key: "true"}
                wanted = REFUSED if rule.becomes.startswith("refused") else IGNORED
                if key != "PYTHONHASHSEED" and key not in tried:
                    assert note_of(read_lmcache(yaml.safe_dump(given), {}), key)[0] is wanted, key
        else:
            assert set(rule.names) <= tried, rule.names


def test_the_page_for_lmcaches_users_has_the_table_as_it_is():
    rows = [f"| {', '.join(f'`{name}`' for name in rule.names)} | {rule.becomes} |" for rule in RULES]
    page = (DOCS / "lmcache.md").read_text().partition("\n| key | becomes |\n")[2]
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows


def test_each_key_has_one_note_and_the_environment_is_laid_over_the_file():
    environment = {
        "LMCACHE_CHUNK_SIZE": "'64'",
        "LMCACHE_EXTRA_CONFIG": '{"protocol": "rdma"}',
        "LMCACHE_CONFIG_FILE": "x.yaml",
        "LMCACHE_LOCAL_CPU": "",
        "LMCACHE_USE_EXPERIMENTAL": "True",
        "PYTHONHASHSEED": "0",
        "PATH": "/bin",
    }
    draft = read_lmcache("chunk_size: 256\nextra_config: {device_name: a}\nuse_layerwise: true\n", environment)
    assert [(note.key, note.fate) for note in draft.notes] == [
        ("chunk_size", MAPPED),
        ("use_layerwise", IGNORED),
        ("use_experimental", IGNORED),
        ("extra_config.protocol", MAPPED),
        ("PYTHONHASHSEED", IGNORED),
    ]
    assert draft.whole() == {"kv": {"chunk_tokens": 64}, "transport": {"kind": "ucx"}}
    assert read_lmcache(None, {"PYTHONHASHSEED": "0"}).notes == []


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("a: [", {}, "not valid YAML at line"),
        ("- a", {}, "expected LMCache's"),
        ("extra_config: 3", {}, "extra_config: expected a mapping"),
        ("", {"LMCACHE_EXTRA_CONFIG": "{"}, "LMCACHE_EXTRA_CONFIG: not valid JSON"),
    ],
)
def test_what_is_no_file_of_lmcaches_is_refused(text, environment, message):
    with pytest.raises(ConfigError, match=message):
        read_lmcache(text, environment)


def test_the_files_that_users_copy_are_read_as_they_stand():
    tutorial = read_lmcache(TUTORIAL, {})
    assert tutorial.refused() == []
    assert tutorial.whole() == {
        **redis("redis://localhost:6379"),
        "kv": {"chunk_tokens": 256},
        **both(segment="10GB"),
    }
    prefiller = read_lmcache(MOONCAKE_PREFILLER, {})
    assert prefiller.refused() == []
    assert prefiller.part == {
        "kv": {"chunk_tokens": 256},
        "transport": {"kind": "ucx", "devices": ["mlx5_0"]},
        "tiers": {
            "mooncake": {
                "master": "127.0.0.1:50052",
                "global_segment_size": "3200MiB",
                "protocol": "rdma",
                "rdma_devices": ["mlx5_0"],
                "metadata_server": "http://127.0.0.1:8080/metadata",
            }
        },
    }
    native = read_lmcache(NATIVE, {})
    assert native.refused() == []
    assert native.whole() == {
        "kv": {"chunk_tokens": 256},
        **both(segment="10GiB"),
        "tiers": {
            "mooncake": {
                "master": "127.0.0.1:50051",
                "local_hostname": "127.0.0.1",
                "metadata_server": "http://127.0.0.1:8080/metadata",
                "global_segment_size": "3200MiB",
                "local_buffer_size": "1GiB",
                "timeout_s": 1.0,
            }
        },
    }


def test_the_printed_part_is_read_by_a_cluster_file_that_has_the_rest(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LMCACHE_LOCAL_DISK", "/nvme")
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_DISK_SIZE", "2")
    (tmp_path / "lm.yaml").write_text(TUTORIAL)
    assert cli.main(["config", "from-lmcache", str(tmp_path / "lm.yaml")]) == 0
    out = capsys.readouterr().out
    assert "# storage: mapped: tiers.redis.url: redis://localhost:6379" in out
    (tmp_path / "cluster.yaml").write_text(f"cluster: c\nmodel: {{path: m, name: m}}\nengine: {{kind: sim}}\n{out}")
    config = load_config(tmp_path / "cluster.yaml")
    assert (config.kv.chunk_tokens, config.nodes["decode-0"].segment) == (256, 10**10)
    assert config.tiers == TiersConfig(
        disk=DiskTierConfig(path="/nvme", size=2 * GIB), redis=RedisTierConfig(url="redis://localhost:6379")
    )


def test_a_refused_key_is_said_on_stderr_and_by_the_exit_code(tmp_path, capsys):
    (tmp_path / "lm.yaml").write_text("remote_url: lm://h:1")
    assert cli.main(["config", "from-lmcache", str(tmp_path / "lm.yaml")]) == 1
    said = capsys.readouterr()
    assert "# remote_url: refused" in said.out and "remote_url: refused: there is no tier for lm://" in said.err
    assert cli.main(["config", "from-lmcache", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: no such file" in capsys.readouterr().err


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """`kvferry serve` up to where processes would start; gives the command's first words and the file it writes."""
    on = Machine(cores=(0, 1), gpus=(), memory_bytes=16 * GIB, vllm=None, has_torch=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(serve, "this_machine", lambda: on)
    monkeypatch.setattr("kvferry.doctor.checks.preflight", lambda config: None)
    monkeypatch.setattr("kvferry.launch.up.run_up", lambda *given: 0)
    (tmp_path / "m").mkdir()
    return ["serve", str(tmp_path / "m")], tmp_path / "kvferry/serve-m/cluster.yaml"


def test_serve_obeys_the_environment_and_says_so_once(serving, monkeypatch, capsys):
    command, file = serving
    monkeypatch.setenv("LMCACHE_CHUNK_SIZE", "192")
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "8")
    assert cli.main(command) == 0
    config = load_config(file)
    assert config.kv.chunk_tokens == 192 and {node.segment for node in config.nodes.values()} == {8 * GIB}
    assert capsys.readouterr().out.count("LMCache's chunk_size: mapped: kv.chunk_tokens: 192\n") == 1


def test_serve_obeys_the_file_and_the_command_line_wins(serving, tmp_path, monkeypatch):
    command, file = serving
    (tmp_path / "lm.yaml").write_text(
        f"{TUTORIAL}local_disk: file:///a/,file:///b/\nmax_local_disk_size: 3\nblocking_timeout_secs: 4\n"
        "save_decode_cache: false\nenable_pd: true\npd_role: sender\n"
    )
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "lm.yaml"))
    assert cli.main([*command, "--colocated"]) == 0
    assert list(load_config(file).nodes) == ["decode-0"]
    assert cli.main(command) == 0
    config = load_config(file)
    assert (config.kv.chunk_tokens, config.nodes["prefill-0"].segment) == (256, 10**10)
    assert config.tiers == TiersConfig(redis=RedisTierConfig(url="redis://localhost:6379", timeout_s=4.0))
    assert [node.disk.path for node in config.nodes.values() if node.disk] == ["/a/", "/b/"]
    assert config.engine is not None and config.engine.save_output is False
    options = ["--segment", "1GiB", "--tier", "redis://other:1", "--tier", "disk:/c:1GiB"]
    assert cli.main([*command, *options, "--set", "kv.chunk_tokens=64"]) == 0
    config = load_config(file)
    assert (config.kv.chunk_tokens, config.nodes["prefill-0"].segment) == (64, GIB)
    assert config.tiers.redis == RedisTierConfig(url="redis://other:1")
    assert config.tiers.disk == DiskTierConfig(path="/c", size=GIB) and config.nodes["decode-0"].disk is None


def test_serve_refuses_what_is_not_there_by_name(serving, tmp_path, monkeypatch, capsys):
    command, file = serving
    (tmp_path / "lm.yaml").write_text(f"{MOONCAKE_PREFILLER}enable_blending: true\n")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "lm.yaml"))
    assert cli.main(command) == 2
    assert "enable_blending: refused: not there" in capsys.readouterr().err
    assert not file.exists()
    monkeypatch.setenv("LMCACHE_ENABLE_BLENDING", "false")
    assert cli.main(command) == 0, "the environment is laid over the file"
    assert load_config(file).transport.devices == ["mlx5_0"]


def test_a_mooncake_of_lmcaches_users_is_served_over_tcp_and_refused_over_rdma_without_a_device(
    serving, tmp_path, monkeypatch, capsys
):
    command, file = serving
    (tmp_path / "lm.yaml").write_text(MOONCAKE_PREFILLER)
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "lm.yaml"))
    monkeypatch.setattr("kvferry.doctor.checks.preflight", preflight)
    monkeypatch.setattr("kvferry.doctor.checks.PREFLIGHT", (check_transports,))
    assert cli.main(command) == 2
    assert re.search("mlx5_0|libucp", capsys.readouterr().err) and not file.exists()
    monkeypatch.setenv("LMCACHE_PROTOCOL", "tcp")
    assert cli.main(command) == 0
    config = load_config(file)
    assert config.transport.kind == "auto" and config.tiers.mooncake == MooncakeTierConfig(
        master="127.0.0.1:50052",
        metadata_server="http://127.0.0.1:8080/metadata",
        global_segment_size=3200 << 20,
    )
    said = capsys.readouterr().out
    assert "LMCache's device_name: ignored: the protocol is not rdma; LMCache itself ignores this key\n" in said
    assert "mooncake tier: 127.0.0.1:50052, lent 3200MiB of each node" in said
