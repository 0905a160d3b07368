"""The keys of LMCache that say something in our file. Each function writes it into the draft and says so. Pure.

A ValueError is a key that cannot be obeyed: its text says why, and what is nearest.
"""

import re
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from kvcore.config.tiers import ObjectTierConfig
from kvcore.errors import ConfigError
from kvcore.types import Role
from kvferry.cluster_text import size_text
from kvferry.lmcache import mooncake
from kvferry.lmcache.buckets import bucket_section
from kvferry.lmcache.draft import Draft, Fate
from kvferry.lmcache.values import bool_remark, read_bool, read_gib, read_int, read_number
from kvferry.tier_options import check_redis_url, shown
from kvstore.tiers.objects.place import object_place
from kvstore.tiers.places.redis_url import SERVICE

Verdict = tuple[Fate, str]
Take = Callable[[Draft, object], Verdict]

SMALLEST_SEGMENT = 256 << 20
"""Of a node that is to keep nothing in memory: what goes from prefiller to decoder passes through it all the same."""
_REDIS = {"redis": "redis", "rediss": "rediss", "resp": "redis", "valkey": "redis"}
_REDIS |= {"redis-sentinel": "redis-sentinel", "redis-cluster": "redis-cluster"}
_A_REDIS = "a Redis as redis://HOST:PORT"
_NEAREST = {
    "lm": f"none, as the metadata server and the nodes' memory do that, or {_A_REDIS}",
    "infinistore": f"none, as nodes share their memory, over RDMA too, or {_A_REDIS}",
}


def chunk_size(draft: Draft, value: object) -> Verdict:
    """Tokens of a chunk."""
    tokens = read_int(value, 1)
    draft.put("kv.chunk_tokens", tokens)
    return Fate.MAPPED, f"kv.chunk_tokens: {tokens}"


def local_cpu(draft: Draft, value: object) -> Verdict:
    """Whether chunks are kept in memory."""
    if read_bool(value):
        return Fate.IGNORED, "nodes keep chunks in memory in any case"
    draft.node["segment"] = size_text(SMALLEST_SEGMENT)
    said = "the smallest segment, as what goes from prefiller to decoder passes through it"
    return Fate.MAPPED, f"nodes.*.segment: {size_text(SMALLEST_SEGMENT)}, {said}{bool_remark(value)}"


def max_local_cpu_size(draft: Draft, value: object) -> Verdict:
    """GiB of memory for chunks."""
    size, remark = read_gib(value)
    if not read_bool(draft.settings.get("local_cpu", True)):
        return Fate.IGNORED, "local_cpu is false"
    size = max(size, SMALLEST_SEGMENT)
    draft.node["segment"] = size_text(size)
    return Fate.MAPPED, f"nodes.*.segment: {size_text(size)}, of each node, not of each worker{remark}"


def hugepages(draft: Draft, value: object) -> Verdict:
    """Huge pages for that memory."""
    draft.node["hugepages"] = read_bool(value)
    return Fate.MAPPED, f"nodes.*.hugepages: {str(read_bool(value)).lower()}{bool_remark(value)}"


def numa_mode(draft: Draft, value: object) -> Verdict:
    """Where that memory lies. One number is all that a segment has."""
    mapping = draft.settings.get("extra_config.gpu_to_numa_mapping")
    numbers = {str(number) for number in mapping.values()} if isinstance(mapping, Mapping) else set()
    if len(numbers) != 1:
        return Fate.IGNORED, f"{value}: which NUMA node is not known here; set nodes.NAME.numa_node"
    draft.node["numa_node"] = read_int(numbers.pop(), 0)
    return Fate.MAPPED, f"nodes.*.numa_node: {draft.node['numa_node']}"


def local_disk(draft: Draft, value: object) -> Verdict:
    """Paths, as text with commas or as a list, with or without `file://`. Their size is another key's."""
    given = value if isinstance(value, list) else str(value).split(",")
    paths = [re.sub(r"^file://", "", str(path).strip()) for path in given]
    paths = [path for path in paths if path]
    if not paths:
        return Fate.IGNORED, "no path, no disk tier"
    size, _ = read_gib(draft.settings.get("max_local_disk_size", 0))
    if not size:
        return Fate.IGNORED, "max_local_disk_size is 0 or missing: nothing would be kept there in LMCache either"
    if len(paths) == 1:
        draft.put("tiers.disk", {"path": paths[0], "size": size_text(size)})
        return Fate.MAPPED, f"tiers.disk.path: {paths[0]}"
    draft.disks = [{"path": path, "size": size_text(size)} for path in paths]
    return Fate.MAPPED, f"nodes.*.disk.path: {', '.join(paths)}, node by node in turn"


def max_local_disk_size(draft: Draft, value: object) -> Verdict:
    """GiB of the disk tier: `local_disk` takes it from the settings."""
    size, remark = read_gib(value)
    if not size or not draft.settings.get("local_disk"):
        return Fate.IGNORED, "it is 0: no disk tier" if not size else "there is no local_disk"
    return Fate.MAPPED, f"tiers.disk.size: {size_text(size)}, of each node, all taken at start{remark}"


def remote_url(draft: Draft, value: object) -> Verdict:
    """A store elsewhere."""
    url = str(value).strip()
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator:
        raise ValueError(f"{url!r} is no URL; expected redis://HOST:PORT")
    if scheme in ("s3", "fs"):
        return objects(draft, url)
    if scheme == mooncake.SCHEME:
        return mooncake.master(draft, url)
    if scheme not in _REDIS:
        nearest = _NEAREST.get(scheme, f"{_A_REDIS}, or a disk, local_disk")
        raise ValueError(f"there is no tier for {scheme}://; nearest: {nearest}")
    url = f"{_REDIS[scheme]}://{rest}"
    try:
        check_redis_url(url, shown(url), {SERVICE: "known when it is opened"})
    except ConfigError as error:
        raise ValueError(error.message) from None
    draft.put("tiers.redis.url", url)
    unnamed = scheme == "redis-sentinel" and not urlsplit(url).path.strip("/")
    said = f", its service is {SERVICE} of the environment" if unnamed else ""
    return Fate.MAPPED, f"tiers.redis.url: {shown(url)}{said}"


def objects(draft: Draft, url: str) -> Verdict:
    """A bucket as `s3://BUCKET.HOST`, or a folder as `fs://[HOST:PORT]/FOLDER`, where host and port say nothing."""
    options = {name: draft.settings.get(f"extra_config.{name}") for name in ("s3_region", "disable_tls")}
    section = bucket_section(url, options["s3_region"], encrypted=not read_bool(options["disable_tls"]))
    try:
        place = object_place(ObjectTierConfig(**section))
    except ConfigError as error:
        raise ValueError(error.message) from None
    for name, value in section.items():
        draft.put(f"tiers.object.{name}", value)
    more = "; credentials are taken from the environment" if place.folder is None else ""
    return Fate.MAPPED, f"tiers.object.url: {section['url']}{more}"


def storage(draft: Draft, value: object) -> Verdict:
    """`storage: {type: redis, host, port}` of tutorials."""
    remark = "LMCache itself ignores `storage`, its key is remote_url"
    if draft.settings.get("remote_url"):
        return Fate.IGNORED, f"remote_url is given ({remark})"
    kind = str(value.get("type")).lower() if isinstance(value, Mapping) else "nothing"
    if not isinstance(value, Mapping) or kind not in _REDIS:
        raise ValueError(f"its type is {kind}; nearest: remote_url with a Redis as redis://HOST:PORT ({remark})")
    host = str(value.get("host", "localhost"))
    place = f"[{host}]" if ":" in host else host
    fate, said = remote_url(draft, f"{kind}://{place}:{read_int(value.get('port', 6379), 1)}")
    return fate, f"{said} ({remark})"


def _remote_tier(settings: Mapping[str, object]) -> str:
    """The section of the tier that `remote_url`, or `storage` without it, names; empty: none."""
    url, section = settings.get("remote_url"), settings.get("storage")
    scheme = str(url).partition("://")[0] if url else str(section.get("type")) if isinstance(section, Mapping) else ""
    scheme = scheme.strip().lower()
    if scheme in _REDIS or not url:
        return "redis" if scheme in _REDIS else ""
    return "object" if scheme in ("s3", "fs") else "mooncake" if scheme == mooncake.SCHEME else ""


def save_decode_cache(draft: Draft, value: object) -> Verdict:
    """Whether generated tokens are stored."""
    draft.put("engine.save_output", read_bool(value))
    return Fate.MAPPED, f"engine.save_output: {str(read_bool(value)).lower()}{bool_remark(value)}"


def save_unfull_chunk(_: Draft, value: object) -> Verdict:
    """Whether a prompt's last, shorter chunk is stored."""
    if read_bool(value):
        said = "only full chunks are found again, so up to chunk_size - 1 tokens of a prompt are computed anew"
        return Fate.IGNORED, f"{said}; nearest: a smaller chunk_size"
    return Fate.IGNORED, f"only full chunks are found again, as it asks{bool_remark(value)}"


def remote_serde(_: Draft, value: object) -> Verdict:
    """How bytes are written to the remote store. LMCache's kivi changes nothing yet."""
    kind = str(value).strip().lower()
    if kind in ("naive", "kivi"):
        return Fate.IGNORED, f"tiers hold chunks as they are{', as LMCache does with kivi' if kind == 'kivi' else ''}"
    if kind != "cachegen":
        raise ValueError(f"{value!r} is none of naive, kivi and cachegen; nearest: naive")
    return Fate.IGNORED, "cachegen is lossy; tiers hold chunks as they are; nearest: codec: int8 in the tier's section"


def cache_policy(draft: Draft, value: object) -> Verdict:
    """Who is evicted."""
    policy = str(value).strip().lower()
    if policy not in ("lru", "lfu", "fifo", "arc"):
        raise ValueError(f"{value!r} is not there; nearest: LRU")
    draft.put("store.eviction", policy)
    return Fate.MAPPED, f"store.eviction: {policy}"


def blocking_timeout(draft: Draft, value: object) -> Verdict:
    """Seconds for one call to the remote store."""
    seconds = read_number(value)
    if not seconds:
        raise ValueError("0 s for a call; expected more")
    if not (tier := _remote_tier(draft.settings)):
        return Fate.IGNORED, "there is no remote store"
    if tier == "mooncake" and mooncake.given(draft.settings, "transfer_timeout") is not None:
        return Fate.IGNORED, "transfer_timeout is given"
    draft.put(f"tiers.{tier}.timeout_s", seconds)
    return Fate.MAPPED, f"tiers.{tier}.timeout_s: {seconds:g}"


def lookup_timeout(draft: Draft, value: object) -> Verdict:
    """Milliseconds that a request waits for stored chunks at most."""
    seconds = read_number(value) / 1000
    if not seconds:
        raise ValueError("0 ms to wait; expected more")
    draft.put("tiers.wait_s", seconds)
    return Fate.MAPPED, f"tiers.wait_s: {seconds:g}, for finding and loading together"


def pd_role(draft: Draft, value: object) -> Verdict:
    """Sender or receiver."""
    enabled = draft.settings.get("enable_pd", draft.settings.get("enable_xpyd", False))
    if not read_bool(enabled):
        return Fate.IGNORED, "enable_pd is not true"
    role = {"sender": Role.PREFILLER, "receiver": Role.DECODER}.get(str(value).strip().lower())
    if role is None and str(value).strip().lower() != "both":
        raise ValueError(f"{value!r}; expected sender (a prefiller) or receiver (a decoder)")
    draft.role = role
    if role is None:
        return Fate.MAPPED, "a prefiller and a decoder"
    return Fate.MAPPED, f"nodes.*.role: {role.value}; `kvferry serve` runs both on this machine all the same"


def protocol(draft: Draft, value: object) -> Verdict:
    """What Mooncake moves bytes by."""
    kind = str(mooncake.given(draft.settings, "protocol") or value).strip().lower()
    if kind == "rdma":
        draft.put("transport.kind", "ucx")
        too = mooncake.put_too(draft, "protocol", kind)
        return Fate.MAPPED, f"transport.kind: ucx{too}, refused on a machine without an RDMA device"
    if kind == "tcp":
        return Fate.IGNORED, "nodes use shared memory on one host and TCP between hosts"
    raise ValueError(f"{value!r} is not there; nearest: tcp, or rdma")


def device_name(draft: Draft, value: object) -> Verdict:
    """The RDMA devices."""
    named = mooncake.given(draft.settings, "device_name") or ""
    devices = [name.strip() for name in str(named).split(",") if name.strip()]
    kind = mooncake.given(draft.settings, "protocol")
    if not devices or str(kind).strip().lower() != "rdma":
        return Fate.IGNORED, "the protocol is not rdma" if devices else "empty"
    draft.put("transport.devices", devices)
    too = mooncake.put_too(draft, "rdma_devices", devices)
    return Fate.MAPPED, f"transport.devices{too}: {', '.join(devices)}"
