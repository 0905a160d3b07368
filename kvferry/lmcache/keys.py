"""The table of LMCache's keys (0.5): what each becomes here, or why it is ignored or refused. Pure.

`docs/lmcache.md` has the same table; a test holds them together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kvferry.lmcache import mapping, mooncake
from kvferry.lmcache.draft import Draft, Fate
from kvferry.lmcache.mapping import Take, Verdict
from kvferry.lmcache.values import read_bool


@dataclass(frozen=True, slots=True)
class KeyRule:
    """One row."""

    names: tuple[str, ...]
    """Keys, or patterns with `*`; the first row that fits counts."""
    becomes: str
    """In the documentation's words."""
    take: Take
    doubtful: bool = False
    """LMCache itself ignores the key, with a warning."""


def _ignored(names: str, why: str) -> KeyRule:
    def take(_: Draft, __: object) -> Verdict:
        return Fate.IGNORED, why

    return KeyRule(tuple(names.split()), f"ignored: {why}", take)


def _refused(names: str, nearest: str, *, switch: bool = False) -> KeyRule:
    """`switch`: it is on or off, as LMCache reads it."""

    def take(_: Draft, value: object) -> Verdict:
        off = not read_bool(value) if switch else str(value).strip().lower() in ("", "false", "0", "none", "[]", "{}")
        if off:
            return Fate.IGNORED, "off, as here"
        raise ValueError(f"not there; {nearest}")

    return KeyRule(tuple(names.split()), f"refused, unless it is off: {nearest}", take)


def _mapped(names: str, becomes: str, take: Take, *, doubtful: bool = False) -> KeyRule:
    return KeyRule(tuple(names.split()), becomes, take, doubtful)


def _of_mooncake(name: str, becomes: str, take: Take, *, mooncakes: str = "") -> Iterator[KeyRule]:
    """In `extra_config`, there with `mooncake_` before Mooncake's own name too; at the top LMCache ignores it."""
    yield _mapped(f"extra_config.{name} extra_config.mooncake_{mooncakes or name}", becomes, take)
    yield _mapped(name, f"as `extra_config.{name}`", take, doubtful=True)


_MEASURED = "loading or computing is decided by measured rates"
_CLUSTER_FILE = "addresses, ports and buffers are the cluster file's (`nodes`)"
_METADATA = "the metadata server does this for all nodes"
_MOONCAKE = "an option of Mooncake's client that has no counterpart"
_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment: no file of ours has credentials"
_OBSERVED = "`/metrics`, `kvferry status` and `/v1/info` are always there"

RULES: Sequence[KeyRule] = (
    _mapped("chunk_size", "`kv.chunk_tokens`", mapping.chunk_size),
    _mapped("local_cpu", "`false`: the smallest segment, 256MiB", mapping.local_cpu),
    _mapped(
        "max_local_cpu_size",
        "`nodes.*.segment`, in GiB, or with a unit (`10GB`), which LMCache does not read",
        mapping.max_local_cpu_size,
    ),
    _mapped("local_cpu_use_hugepages", "`nodes.*.hugepages`", mapping.hugepages),
    _mapped("numa_mode", "`nodes.*.numa_node`, where `gpu_to_numa_mapping` names one only", mapping.numa_mode),
    _ignored("extra_config.gpu_to_numa_mapping", "numa_mode says what became of it"),
    _mapped("local_disk", "`tiers.disk.path`; several paths: `nodes.*.disk`, node by node in turn", mapping.local_disk),
    _mapped("max_local_disk_size", "`tiers.disk.size`, as `max_local_cpu_size`", mapping.max_local_disk_size),
    _mapped(
        "remote_url",
        "`tiers.redis.url` for redis, rediss, resp, valkey, redis-sentinel, redis-cluster; `tiers.object` for s3, fs; "
        "`tiers.mooncake` for mooncakestore; others (lm, infinistore) are refused with what is nearest",
        mapping.remote_url,
    ),
    _mapped("storage", "`tiers.redis.url`, from `{type: redis, host, port}`", mapping.storage, doubtful=True),
    _mapped(
        "remote_serde",
        "ignored: chunks are kept as they are; nearest to cachegen, which is lossy: `tiers.*.codec: int8`",
        mapping.remote_serde,
    ),
    _mapped("save_decode_cache", "`engine.save_output`", mapping.save_decode_cache),
    _mapped(
        "save_unfull_chunk",
        "ignored: only full chunks are found again; nearest: a smaller `chunk_size`",
        mapping.save_unfull_chunk,
    ),
    _mapped("cache_policy", "`store.eviction`: LRU, LFU, FIFO, ARC; others are refused", mapping.cache_policy),
    _mapped("blocking_timeout_secs", "`timeout_s` of the tier that `remote_url` names", mapping.blocking_timeout),
    _mapped("lookup_timeout_ms", "`tiers.wait_s`", mapping.lookup_timeout),
    _mapped("pd_role", "`nodes.*.role`: sender is a prefiller, receiver a decoder", mapping.pd_role),
    _mapped("nixl_role", "as `pd_role`", mapping.pd_role, doubtful=True),
    _mapped(
        "extra_config.protocol extra_config.mooncake_protocol",
        "rdma: `transport.kind: ucx`, and `tiers.mooncake.protocol` where there is one; tcp is used anyway",
        mapping.protocol,
    ),
    _mapped("protocol", "as `extra_config.protocol`", mapping.protocol, doubtful=True),
    _mapped(
        "extra_config.device_name extra_config.mooncake_rdma_devices",
        "`transport.devices`, and `tiers.mooncake.rdma_devices` where there is one, with rdma",
        mapping.device_name,
    ),
    _mapped("device_name", "as `extra_config.device_name`", mapping.device_name, doubtful=True),
    _ignored("min_retrieve_tokens hit_miss_ratio enable_scheduler_bypass_lookup", _MEASURED),
    _ignored("pre_caching_hash_algorithm PYTHONHASHSEED", "keys are chains of SHA-256, the same in every process"),
    _ignored("enable_pd enable_xpyd", "pd_role says which; prefillers and decoders are the usual case here"),
    _refused(
        "enable_blending",
        "vLLM engines reuse only what was computed as the beginning of a prompt; nearest: docs/documents.md",
        switch=True,
    ),
    _ignored("blend_*", "of enable_blending"),
    _refused("gds_path weka_path maru_path", "nearest: a disk, local_disk, or `transport: ucx` between machines"),
    _ignored("use_gds gds_* weka_* maru_*", "of gds_path, weka_path or maru_path"),
    _refused("use_gpu_connector_v3", "kvferry's own connector moves KV", switch=True),
    _refused("enable_hidden_state_cache", "only KV is cached", switch=True),
    _ignored("hidden_state* max_hidden_state_cpu_size", "of enable_hidden_state_cache"),
    _refused(
        "runtime_plugin_locations storage_plugins remote_storage_plugins plugin_locations external_backends script_*",
        "LMCache's plugins do not run here; nearest: a tier of docs/tiers.md",
    ),
    _refused("remote_config_url", "a cluster has one file; copy it to every machine"),
    _refused("audit_actual_remote_url external_lookup_client", "the metadata server knows what lies where"),
    _refused("extra_config.enable_nixl_storage", "nearest: a disk, local_disk"),
    _ignored("pd_* nixl_* transfer_channel", f"{_CLUSTER_FILE}; `transport` says how bytes move"),
    _ignored("enable_p2p p2p_* enable_controller controller_* lmcache_instance_id lmcache_worker_*", _METADATA),
    _ignored("lookup_server_worker_ids mp_host mp_port app_id", _METADATA),
    _ignored("use_layerwise enable_async_loading", "loading overlaps with computing as the engine allows"),
    _ignored("enable_kv_events enable_chunk_statistics chunk_statistics_* internal_api_server_*", _OBSERVED),
    _ignored("pin_timeout_sec pin_check_interval_sec", "chunks are held by leases that end (`store.read_lease_s`)"),
    _ignored("retrieve_locations store_location", "chunks go to every tier and come from the fastest that has them"),
    _ignored("priority_limit", "every request's chunks are stored"),
    _ignored(
        "reserve_local_cpu_size enable_lazy_memory_allocator lazy_memory_* py_enable_gc local_disk_path_sharding "
        "cost_aware_*",
        "a node takes its segment and its file at start, in a process of its own",
    ),
    *_of_mooncake("local_hostname", "`tiers.mooncake.local_hostname`", mooncake.local_hostname),
    *_of_mooncake("metadata_server", "`tiers.mooncake.metadata_server`", mooncake.metadata_server),
    *_of_mooncake(
        "master_server_address",
        "`tiers.mooncake.master`, before the host and port of `remote_url`",
        mooncake.master_server_address,
        mooncakes="master_server_addr",
    ),
    *_of_mooncake("global_segment_size", "`tiers.mooncake.global_segment_size`", mooncake.global_segment_size),
    *_of_mooncake("local_buffer_size", "`tiers.mooncake.local_buffer_size`", mooncake.local_buffer_size),
    *_of_mooncake("transfer_timeout", "`tiers.mooncake.timeout_s`", mooncake.transfer_timeout),
    _ignored("extra_config.storage_root_dir extra_config.use_exists_sync extra_config.mooncake_*", _MOONCAKE),
    KeyRule(
        ("storage_root_dir", "use_exists_sync"),
        f"ignored: {_MOONCAKE}",
        lambda _, __: (Fate.IGNORED, _MOONCAKE),
        doubtful=True,
    ),
    _ignored("extra_config.s3_region extra_config.disable_tls", "`remote_url` with s3 takes it"),
    _ignored("extra_config.aws_access_key_id extra_config.aws_secret_access_key", _CREDENTIALS),
    _ignored("extra_config.s3_*", "`tiers.object.connections` says how many chunks are on their way at once"),
    _ignored("extra_config.*", "an option of a backend that is not there"),
    _ignored("use_experimental track_usage log_level", "nothing here reads it"),
)


def find_rule(key: str) -> KeyRule | None:
    """The first row that fits; None: LMCache has no such key either."""
    for rule in RULES:
        if any(fnmatchcase(key, name) for name in rule.names):
            return rule
    return None


def known_keys() -> list[str]:
    """Those that are written out in the table."""
    return [name for rule in RULES for name in rule.names if "*" not in name]
