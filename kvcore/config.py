"""The schema of a cluster file: one YAML a cluster, typed and frozen. `kvcore.config_file` reads it.

Every field has its unit in its name. Nothing writes back into a config.
"""

from enum import StrEnum

import msgspec

from kvcore.types import Role


class ByteSize(int):
    """A number of bytes; in YAML an integer or text such as `512MiB`, `40GiB`, `2GB`."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ModelConfig(_Section, frozen=True, kw_only=True):
    """The model that the cluster serves."""

    path: str
    """Folder in Hugging Face format, `~` and relative to the YAML resolved on reading. For `sim`: any name."""
    name: str
    """What clients send as `model`."""
    dtype: str = "float32"
    max_context: int | None = None
    """Lower than the model's own, to save memory."""


class KVConfig(_Section, frozen=True, kw_only=True):
    """How KV is cut and checked."""

    chunk_tokens: int = 256
    verify: bool = True
    """Checksum every chunk on read. Header fields are always checked."""


class TorchEngineConfig(_Section, frozen=True, kw_only=True, tag_field="kind", tag="torch"):
    """The embedded engine."""

    threads: int = 1
    block_size: int = 64
    """Tokens a block; divides kv.chunk_tokens."""
    kv_cache: ByteSize = ByteSize(512 << 20)
    max_batch_tokens: int = 512
    """Tokens computed in one step at most (chunked prefill)."""
    max_sequences: int = 32
    max_waiting: int = 512
    """Requests queued at most; more are refused as overloaded."""
    device: str = "cpu"
    save_output: bool = True
    """Store full chunks of generated tokens too, so that the next turn hits on any node."""


class SimEngineConfig(_Section, frozen=True, kw_only=True, tag_field="kind", tag="sim"):
    """No model: a timing model, and real bytes derived from the tokens."""

    block_size: int = 16
    num_blocks: int = 4096
    bytes_per_token: int = 64
    """Multiple of 16."""
    max_context: int = 8192
    vocab_size: int = 50_000
    prefill_tokens_per_s: float = 20_000.0
    inter_token_s: float = 0.01
    batch_slowdown: float = 0.02
    """Each further sequence in a step makes it longer by this share."""
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    max_waiting: int = 1024
    weights_version: str = "v1"
    """Stands for the weights: other versions give other KV and other tokens."""
    save_output: bool = True


EngineConfig = TorchEngineConfig | SimEngineConfig


class TransportConfig(_Section, frozen=True, kw_only=True):
    """How bytes move. `auto`: shared memory on one host, else `tcp`. A named transport is used or start-up fails."""

    kind: str = "auto"
    """`auto`, `shm`, `tcp`, `ucx`."""
    devices: list[str] = []
    fallback: str | None = None
    streams: int = 2
    """TCP connections to one peer at most."""
    timeout_s: float = 30.0
    """For one batch."""


class StoreConfig(_Section, frozen=True, kw_only=True):
    """Allocation and leases."""

    high_watermark: float = 0.95
    """Share of a segment above which least recently used chunks are evicted ..."""
    low_watermark: float = 0.85
    """... down to this."""
    max_replicas: int = 2
    reserve_ttl_s: float = 60.0
    read_lease_s: float = 30.0
    retire_grace_s: float = 2.0
    """Room of an expired reservation is not given out again before this: its writer may still be writing."""


class MetadataServerConfig(_Section, frozen=True, kw_only=True):
    """Where the metadata server listens, and its bounds."""

    host: str = "127.0.0.1"
    port: int = 8700
    node_ttl_s: float = 5.0
    """A node that does not renew its lease for this long is dead."""
    timeout_s: float = 2.0
    """For one call, on the callers' side."""
    max_body: ByteSize = ByteSize(16 << 20)
    event_log: int = 65_536
    """Events kept for replay."""


class RoutingPolicy(StrEnum):
    """How the router chooses."""

    PREFIX_AWARE = "prefix_aware"
    ROUND_ROBIN = "round_robin"


class RouterConfig(_Section, frozen=True, kw_only=True):
    """Where the router listens, how it chooses, its bounds."""

    host: str = "127.0.0.1"
    port: int = 8000
    policy: RoutingPolicy = RoutingPolicy.PREFIX_AWARE
    min_prefill_tokens: int = 64
    """An uncached rest shorter than this is left to the decoder."""
    request_timeout_s: float = 600.0
    prefill_timeout_s: float = 120.0
    connect_timeout_s: float = 2.0
    attempts: int = 4
    """Tries of one leg, over all nodes."""
    probe_interval_s: float = 1.0
    max_body: ByteSize = ByteSize(8 << 20)
    max_requests: int = 1024
    """In flight at once; more get 503 with Retry-After."""


class NodeConfig(_Section, frozen=True, kw_only=True):
    """One machine's process of one role."""

    role: Role
    host: str = "127.0.0.1"
    port: int
    transfer_port: int = 0
    """For tcp; 0: any free one."""
    segment: ByteSize = ByteSize(512 << 20)
    engine: EngineConfig | None = None
    """Overrides the cluster's."""
    host_id: str | None = None
    """Overrides how nodes tell whether they share memory (containers, tests)."""


class ServiceConfig(_Section, frozen=True, kw_only=True):
    """Of every process."""

    drain_s: float = 10.0
    """Requests under way have this long after the first SIGTERM."""
    start_s: float = 120.0
    log_level: str = "info"


class ClusterConfig(_Section, frozen=True, kw_only=True):
    """A whole cluster file."""

    cluster: str
    model: ModelConfig
    engine: EngineConfig
    nodes: dict[str, NodeConfig]
    kv: KVConfig = KVConfig()
    transport: TransportConfig = TransportConfig()
    """Short form in YAML: `transport: tcp`, with `devices: [...]` beside it."""
    store: StoreConfig = StoreConfig()
    metadata_server: MetadataServerConfig = MetadataServerConfig()
    router: RouterConfig = RouterConfig()
    service: ServiceConfig = ServiceConfig()
