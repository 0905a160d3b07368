"""The schema of a cluster file: one YAML a cluster, typed and frozen. `kvcore.config.file` reads it.

Every field has its unit in its name. Nothing writes back into a config.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec

from kvcore.types import Role

Count = Annotated[int, msgspec.Meta(ge=1)]
Rate = Annotated[float, msgspec.Meta(gt=0)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
TransportKind = Literal["auto", "shm", "tcp", "ucx", "nixl"]
FallbackKind = Literal["auto", "shm", "tcp"]
LogLevel = Literal["debug", "info", "warning", "error"]


class ByteSize(int):
    """A number of bytes; in YAML an integer or text such as `512MiB`, `40GiB`, `2GB`."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ModelConfig(_Section, frozen=True, kw_only=True):
    """The model that the cluster serves."""

    path: Text
    """Folder in Hugging Face format (`~` and paths relative to the YAML are resolved on reading) or hub id.

    For `sim`: any name."""
    name: Text
    """What clients send as `model`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_context: Count | None = None
    """Lower than the model's own, to save memory."""


class KVConfig(_Section, frozen=True, kw_only=True):
    """How KV is cut and checked."""

    chunk_tokens: Count = 256
    verify: bool = True
    """Checksum every chunk on read. Header fields are always checked."""


class TorchEngineConfig(_Section, frozen=True, kw_only=True, tag_field="kind", tag="torch"):
    """The embedded engine."""

    threads: Count = 1
    block_size: Count = 64
    """Tokens a block; divides kv.chunk_tokens."""
    kv_cache: ByteSize = ByteSize(512 << 20)
    max_batch_tokens: Count = 512
    """Tokens computed in one step at most (chunked prefill)."""
    max_sequences: Count = 32
    max_waiting: Count = 512
    """Requests queued at most; more are refused as overloaded."""
    device: str = "cpu"
    save_output: bool = True
    """Store full chunks of generated tokens too, so that the next turn hits on any node."""


class SimEngineConfig(_Section, frozen=True, kw_only=True, tag_field="kind", tag="sim"):
    """No model: a timing model, and real bytes derived from the tokens."""

    block_size: Count = 16
    num_blocks: Count = 4096
    bytes_per_token: Count = 64
    """Multiple of 16."""
    max_context: Count = 8192
    vocab_size: Count = 50_000
    prefill_tokens_per_s: Rate = 20_000.0
    inter_token_s: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    batch_slowdown: Annotated[float, msgspec.Meta(ge=0)] = 0.02
    """Each further sequence in a step makes it longer by this share."""
    max_batch_tokens: Count = 2048
    max_sequences: Count = 64
    max_waiting: Count = 1024
    weights_version: str = "v1"
    """Stands for the weights: other versions give other KV and other tokens."""
    save_output: bool = True


class VllmEngineConfig(_Section, frozen=True, kw_only=True, tag_field="kind", tag="vllm"):
    """vLLM. A node's section is laid over the cluster's: see `kvcore.config.vllm_options`."""

    args: dict[str, Any] = {}
    """Any of vLLM's engine arguments, named as on its command line, with `-` or `_`; not those that kvferry sets."""
    env: dict[str, str] = {}
    """Environment of the engine's processes, e.g. CUDA_VISIBLE_DEVICES or VLLM_CPU_OMP_THREADS_BIND."""
    max_requests: Count = 1024
    """Running or waiting at once; more are refused as overloaded."""
    save_output: bool = True
    """Store full chunks of generated tokens too, so that the next turn hits on any node."""


PagedEngineConfig = TorchEngineConfig | SimEngineConfig
"""Engines over our own serving loop, `engines.paged`."""
EngineConfig = PagedEngineConfig | VllmEngineConfig


class TransportConfig(_Section, frozen=True, kw_only=True):
    """How bytes move. `auto`: shared memory on one host, else `tcp`. A named transport is used or start-up fails."""

    kind: TransportKind = "auto"
    devices: list[str] = []
    fallback: FallbackKind | None = None
    """What is used, with a warning, where `ucx` or `nixl` cannot be: one that needs no library and no device. Refused
    beside the other kinds, which would never use it."""
    ucx_library: str | None = None
    """The libucp to load, a path or a name; the system's libucp.so.0 if not given."""
    streams: Count = 2
    """Connections to one segment at most, of `tcp` and of `ucx`; `nixl` has one."""
    timeout_s: Seconds = 30.0
    """For one batch."""


class StoreConfig(_Section, frozen=True, kw_only=True):
    """Allocation and leases."""

    high_watermark: Share = 0.95
    """Share of a segment above which least recently used chunks are evicted ..."""
    low_watermark: Share = 0.85
    """... down to this."""
    max_replicas: Count = 2
    reserve_ttl_s: Seconds = 60.0
    read_lease_s: Seconds = 30.0
    retire_grace_s: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    """Room of an expired reservation is not given out again before this: its writer may still be writing."""


class MetadataServerConfig(_Section, frozen=True, kw_only=True):
    """Where the metadata server listens, and its bounds."""

    host: str = "127.0.0.1"
    port: Port = 8700
    node_ttl_s: Seconds = 5.0
    """A node that does not renew its lease for this long is dead."""
    timeout_s: Seconds = 2.0
    """For one call, on the callers' side."""
    max_body: ByteSize = ByteSize(16 << 20)
    event_log: Count = 65_536
    """Events kept for replay."""


class HandoffKind(StrEnum):
    """How KV gets from a prefiller to a decoder."""

    KVFERRY = "kvferry"
    """Through our store; the nodes are ours."""
    NIXL = "nixl"
    """By vLLM's NixlConnector; the nodes are vLLM servers that run already."""
    MOONCAKE = "mooncake"
    """By vLLM's MooncakeConnector; likewise."""


class RoutingPolicy(StrEnum):
    """How the router chooses."""

    PREFIX_AWARE = "prefix_aware"
    ROUND_ROBIN = "round_robin"


class RouterConfig(_Section, frozen=True, kw_only=True):
    """Where the router listens, how it chooses, its bounds."""

    host: str = "127.0.0.1"
    port: Port = 8000
    policy: RoutingPolicy = RoutingPolicy.PREFIX_AWARE
    min_prefill_tokens: Annotated[int, msgspec.Meta(ge=0)] = 64
    """An uncached rest shorter than this is left to the decoder."""
    request_timeout_s: Seconds = 600.0
    prefill_timeout_s: Seconds = 120.0
    connect_timeout_s: Seconds = 2.0
    attempts: Count = 4
    """Tries of one leg, over all nodes."""
    probe_interval_s: Seconds = 1.0
    max_body: ByteSize = ByteSize(8 << 20)
    max_requests: Count = 1024
    """In flight at once; more get 503 with Retry-After."""


class NodeConfig(_Section, frozen=True, kw_only=True):
    """One machine's process of one role; or, with `url`, a vLLM server that runs already and is only driven."""

    role: Role
    host: str = "127.0.0.1"
    port: Port = 0
    """Must be given, except beside `url`."""
    url: str | None = None
    """Where the vLLM server's OpenAI API is. Beside it only `role` and `bootstrap_port` mean anything."""
    bootstrap_port: Port | None = None
    """Of a prefiller with handoff mooncake: VLLM_MOONCAKE_BOOTSTRAP_PORT there; 8998 if not given."""
    transfer_port: Port = 0
    """For tcp; 0: any free one."""
    segment: ByteSize = ByteSize(512 << 20)
    hugepages: bool = False
    """Huge pages for the segment: reserved ones, else transparent ones; it is an error if there are neither."""
    numa_node: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Where the segment's memory is to lie; anywhere if not given."""
    engine: EngineConfig | None = None
    """Overrides the cluster's."""
    host_id: str | None = None
    """Overrides how nodes tell whether they share memory (containers, tests)."""


class ServiceConfig(_Section, frozen=True, kw_only=True):
    """Of every process."""

    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """Requests under way have this long after the first SIGTERM."""
    start_s: Seconds = 120.0
    log_level: LogLevel = "info"


class ClusterConfig(_Section, frozen=True, kw_only=True):
    """A whole cluster file."""

    cluster: Text
    handoff: HandoffKind = HandoffKind.KVFERRY
    model: ModelConfig
    engine: EngineConfig | None = None
    """Must be given with handoff kvferry and only there: the engines are ours then."""
    nodes: dict[str, NodeConfig]
    kv: KVConfig = KVConfig()
    transport: TransportConfig = TransportConfig()
    """Short form in YAML: `transport: tcp`, with `devices: [...]` beside it."""
    store: StoreConfig = StoreConfig()
    metadata_server: MetadataServerConfig = MetadataServerConfig()
    router: RouterConfig = RouterConfig()
    service: ServiceConfig = ServiceConfig()
