"""The schema of a cluster file: one YAML a cluster, typed and frozen. `kvcore.config.file` reads it.

Every field has its unit in its name. Nothing writes back into a config.
"""

from typing import Annotated, Any, Literal

import msgspec

from kvcore.config.fields import ByteSize, Count, Port, Rate, Seconds, Section, Share, Text
from kvcore.config.hit_rate import HitRateConfig
from kvcore.config.kv.settings import KVConfig
from kvcore.config.mooncake_metadata import MooncakeMetadataConfig
from kvcore.config.partitions import PartitionConfig
from kvcore.config.records import RecordsConfig, SqliteRecordsConfig
from kvcore.config.routing import DecoderPrefill, RoutingPolicy
from kvcore.config.security import SecurityConfig, TlsConfig
from kvcore.config.tiers import DiskTierConfig, TiersConfig
from kvcore.eviction.evictor import PolicyName
from kvcore.handoff import HandoffKind
from kvcore.types import Role

TransportKind = Literal["auto", "shm", "tcp", "ucx", "nixl"]
FallbackKind = Literal["auto", "shm", "tcp"]
TransportIntegrity = Literal["greeting", "frames"]
LogLevel = Literal["debug", "info", "warning", "error"]


class ModelConfig(Section, frozen=True, kw_only=True):
    """The model that the cluster serves."""

    path: Text
    """Folder in Hugging Face format (`~` and relative to the YAML are fine), hub id, or for sim any name."""
    name: Text
    """What clients send as `model`."""
    aliases: list[Text] = msgspec.field(default_factory=list)
    """Other names that clients may send, all for this model. Answers say `name`."""
    adapters: dict[str, Text] = msgspec.field(default_factory=dict)
    """LoRA adapters of the model by the names that clients send as `model`: folders in PEFT's format, or hub ids. They
    take engine vllm (docs/vllm.md); to the simulated one paths are names."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The numbers that the engine computes with. KV of different types is never shared."""
    max_context: Count | None = None
    """Lower than the model's own, to save memory."""
    version: str = ""
    """A name for the weights as they are now, beside what their files say: KV under another one is never shared.
    `POST /v1/weights` of the router changes it while the cluster runs."""
    generation_config: bool = True
    """Whether temperature, top_p, top_k, min_p, penalties and max_new_tokens of the model's `generation_config.json`
    hold where a request says nothing, as vLLM's server takes them."""
    parser: str = "auto"
    """The dialect in which the model writes what it thinks and the tools that it calls (docs/openai.md has the names).

    `auto`: the one that its chat template speaks. `none`: answers are given out as they are written.
    `package.module:name`: a `router.parsing.dialects.Dialect` of yours."""


class TorchEngineConfig(Section, frozen=True, kw_only=True, tag_field="kind", tag="torch"):
    """The embedded engine."""

    threads: Count = 1
    """Threads that compute. Two engines on one machine share its cores."""
    block_size: Count = 64
    """Tokens a block; divides kv.chunk_tokens."""
    kv_cache: ByteSize = ByteSize(512 << 20)
    """Memory for the KV of requests that run, beside the node's segment. A request needs all of its tokens here."""
    max_batch_tokens: Count = 512
    """Tokens computed in one step at most (chunked prefill)."""
    max_sequences: Count = 32
    """Sequences in one step at most; a request has one for each of its completions (`n`)."""
    max_waiting: Count = 512
    """Requests queued at most; more are refused as overloaded."""
    device: str = "cpu"
    """Only `cpu` is supported."""
    save_output: bool = True
    """Store full chunks of generated tokens too, so that the next turn hits on any node."""


class SimEngineConfig(Section, frozen=True, kw_only=True, tag_field="kind", tag="sim"):
    """No model: a timing model, and real bytes derived from the tokens."""

    block_size: Count = 16
    """Tokens a block; divides kv.chunk_tokens."""
    num_blocks: Count = 4096
    """Blocks for the KV of requests that run."""
    bytes_per_token: Count = 64
    """Multiple of 16."""
    max_context: Count = 8192
    """Prompt and completion together, in tokens."""
    vocab_size: Count = 50_000
    """Tokens that there are."""
    prefill_tokens_per_s: Rate = 20_000.0
    """How fast it pretends to read a prompt."""
    inter_token_s: Annotated[float, msgspec.Meta(ge=0)] = 0.01
    """How long it pretends to take for one more token."""
    batch_slowdown: Annotated[float, msgspec.Meta(ge=0)] = 0.02
    """Each further sequence in a step makes it longer by this share."""
    max_batch_tokens: Count = 2048
    """Tokens computed in one step at most."""
    max_sequences: Count = 64
    """Sequences in one step at most."""
    max_waiting: Count = 1024
    """Requests queued at most; more are refused as overloaded."""
    weights_version: str = "v1"
    """Stands for the weights: other versions give other KV and other tokens."""
    save_output: bool = True
    """Store full chunks of generated tokens too."""


class VllmEngineConfig(Section, frozen=True, kw_only=True, tag_field="kind", tag="vllm"):
    """vLLM. A node's section is laid over the cluster's, `args` and `env` name by name: see docs/vllm.md."""

    args: dict[str, Any] = msgspec.field(default_factory=dict)
    """Any of vLLM's engine arguments, named as on its command line, with `-` or `_`; not those that kvferry sets."""
    env: dict[str, str] = msgspec.field(default_factory=dict)
    """Environment of the engine's processes, e.g. CUDA_VISIBLE_DEVICES or VLLM_CPU_OMP_THREADS_BIND."""
    max_requests: Count = 1024
    """Running or waiting at once; more are refused as overloaded."""
    save_output: bool = True
    """Store full chunks of generated tokens too, so that the next turn hits on any node."""


PagedEngineConfig = TorchEngineConfig | SimEngineConfig
"""Engines over our own serving loop, `engines.paged`."""
EngineConfig = PagedEngineConfig | VllmEngineConfig


class TransportConfig(Section, frozen=True, kw_only=True):
    """How bytes move. `auto`: shared memory on one host, else `tcp`. A named transport is used or start-up fails."""

    kind: TransportKind = "auto"
    """How the bytes of a segment reach another process. The same on all nodes that are to reach each other."""
    devices: list[str] = msgspec.field(default_factory=list)
    """For `ucx` and `nixl`: the devices to use, as `ucx_info -d` names them. Empty: every HCA with an active port; it
    is an error if there is none."""
    fallback: FallbackKind | None = None
    """What is used, with a warning, where `ucx` or `nixl` cannot be: one that needs no library and no device. Refused
    beside the other kinds, which would never use it."""
    ucx_library: str | None = None
    """The libucp to load, a path or a name; the system's libucp.so.0 if not given."""
    integrity: TransportIntegrity = "greeting"
    """What is proved over `tcp` in a cluster with a secret: who speaks when a connection is made (`greeting`), or by a
    MAC also each frame that follows (`frames`). The same on all nodes."""
    streams: Count = 2
    """Connections to one segment at most, of `tcp` and of `ucx`; `nixl` has one."""
    timeout_s: Seconds = 30.0
    """For one batch."""


class StoreConfig(Section, frozen=True, kw_only=True):
    """Allocation and leases."""

    high_watermark: Share = 0.95
    """Share of a segment above which chunks are evicted ..."""
    low_watermark: Share = 0.85
    """... down to this."""
    max_replicas: Count = 2
    """Copies of one chunk that are being written or are complete, at most."""
    reserve_ttl_s: Seconds = 60.0
    """A reservation that is not committed within this time expires; its writer stops before that."""
    read_lease_s: Seconds = 30.0
    """A reader's claim on chunks, which keeps them from eviction, lasts this long unless it is given back."""
    retire_grace_s: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    """Room of an expired reservation is not given out again before this: its writer may still be writing."""
    eviction: PolicyName = "lru"
    """Which chunk goes first where room is needed; but never before what continues it there (docs/tiers.md)."""
    ttl_s: Seconds | None = None
    """A chunk is forgotten so long after it was last stored in a segment. Not set: it is kept until room is needed."""
    pin_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    """Share of all segments, and of each disk of `tiers`, that pinned chunks may take; pins beyond it are refused."""
    tenant_share: Share | None = None
    """Share of each segment, and of each node's disk, that chunks of one `cache_salt`, or of none, may take; beyond it
    they push out their own (docs/tiers.md). Not set: no limit."""


class MetadataServerConfig(Section, frozen=True, kw_only=True):
    """Where the metadata server listens, and its bounds."""

    host: str = "127.0.0.1"
    """What it listens on, and the address that all nodes and the router use."""
    port: Port = 8700
    """Of its HTTP API and its `/metrics`."""
    node_ttl_s: Seconds = 5.0
    """A node that does not renew its lease for this long is dead."""
    timeout_s: Seconds = 2.0
    """For one call, on the callers' side."""
    max_body: ByteSize = ByteSize(16 << 20)
    """Longest body of a call; a longer one is refused with 413."""
    event_log: Count = 65_536
    """Events kept for replay."""
    records: RecordsConfig = SqliteRecordsConfig()
    """What must survive it: pins, Mooncake's metadata. Chunks are no part of it: the nodes tell them again."""
    mooncake: MooncakeMetadataConfig = MooncakeMetadataConfig()
    """`/metadata` for Mooncake's own clients."""
    standbys: list[Text] = msgspec.field(default_factory=list)
    """`HOST:PORT` of other metadata servers; one takes over when the one that leads is lost. Needs records in etcd."""
    partitions: list[PartitionConfig] = msgspec.field(default_factory=list)
    """Instead of `host`, `port` and `standbys`: several servers that share the chunk index, each with its own keys."""
    lease_s: Seconds = 4.0
    """Of several: who leads and does not renew its lease for this long leads no longer. Takeover takes up to two."""


class RouterConfig(Section, frozen=True, kw_only=True):
    """Where the router listens, how it chooses, its bounds."""

    host: str = "127.0.0.1"
    """What it listens on. Without `security.keys` let only those reach it who may use it."""
    port: Port = 8000
    """Of the OpenAI API; without `admin_port` also of what the router says of the cluster, and of orders about it."""
    admin_port: Port | None = None
    """A port for operators alone: `/metrics`, `/v1/cluster`, `/v1/nodes`, `/v1/cache`, `/v1/weights`, `/v1/janitor`,
    `/v1/blend` and all of `/v1/requests` are answered there, and no more on `port`. With `security.tls` by
    certificates."""
    admin_host: Text | None = None
    """What it listens on; not set: `host`."""
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    """So many processes answer on `port`; the kernel deals connections out to them. One process uses one core. Bounds
    such as `max_requests` are of each; what is asked about requests is asked of all."""
    process_port: Port | None = None
    """Of several processes each has a port of its own, by which the others and operators reach it: the first this one,
    the next those that follow. Not set: the first has that after `port`."""
    tls: TlsConfig | None = None
    """Answer over HTTPS alone, with this certificate. `kvferry`'s commands take this one, whatever names it has."""
    policy: RoutingPolicy = RoutingPolicy.PREFIX_AWARE
    """How nodes are chosen for a request."""
    min_prefill_tokens: Annotated[int, msgspec.Meta(ge=0)] = 64
    """An uncached rest shorter than this is left to the decoder."""
    decoder_prefill: DecoderPrefill = DecoderPrefill.FASTER
    """Whether it computes a longer one, too, where that is expected to be faster, or only when it is needed."""
    request_timeout_s: Seconds = 600.0
    """For one request, from its arrival to its last token; then it ends with `deadline_exceeded`."""
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 600.0
    """After the first SIGTERM requests under way have this long to end, and none longer than its own
    `request_timeout_s`; then they are cut. A second SIGTERM ends the router at once."""
    prefill_timeout_s: Seconds = 120.0
    """For one try of a prefill leg. The decoder waits no longer than this for chunks, then it computes."""
    connect_timeout_s: Seconds = 2.0
    """For a connection to a node, and for the answer to a probe."""
    stall_first_s: Seconds = 5.0
    """A node that is silent for so long before a first token, and longer than it should be by what was observed of it,
    is suspected: its legs go on at other nodes, and it gets no more until it is seen to work."""
    stall_gap_s: Seconds = 2.0
    """So too between two tokens of a stream."""
    attempts: Count = 4
    """Tries of one leg, over all nodes; one more, after a pause, where the last of them went away."""
    probe_interval_s: Seconds = 1.0
    """Pause between two looks at each node's `/v1/info`; longer with more than 640 nodes."""
    max_body: ByteSize = ByteSize(8 << 20)
    """Longest body of a client's request; a longer one is refused with 413."""
    max_requests: Count = 1024
    """In flight at once; more get 503 with Retry-After."""
    first_token_s: Seconds | None = 30.0
    """A request whose first token is expected later than this is refused with 429 and Retry-After, and one that waits
    for its turn longer leaves. A client's `X-KVFerry-First-Token-S` and a tenant's limit go before; null: as long as
    `request_timeout_s`."""
    max_waiting: Count = 1024
    """Requests that wait for their turn while no node has room; more get 429."""
    max_connections_per_client: Count | None = None
    """Of one address; more get 503. By default four fifths of all that the router's file descriptors allow."""
    cache: HitRateConfig = HitRateConfig()
    """What it says of the hit rate, and whether clients may ask something of the cache."""
    cors: list[Text] = msgspec.field(default_factory=lambda: ["loopback"])
    """Origins of the web pages whose scripts may use the API: `http://HOST:PORT` each, `loopback` for every page of the
    browser's own machine, `*` for every page (vLLM's default), `[]` for none. Without `security.keys`, with
    `*` any site that a user looks at can use a router on that user's machine."""


class NodeConfig(Section, frozen=True, kw_only=True):
    """One machine's process of one role; or, with `url`, a vLLM server that runs already and is only driven."""

    role: Role
    """What the node does."""
    host: str = "127.0.0.1"
    """What it listens on, and the address by which the others reach it; never every interface."""
    port: Port = 0
    """Must be given, except beside `url`."""
    url: str | None = None
    """Where the vLLM server's OpenAI API is. Beside it only `role`, `bootstrap_port` and `events` mean anything."""
    events: Text | None = None
    """`tcp://HOST:PORT` where such a server publishes its KV events: its cache is known then, not guessed."""
    events_replay: Text | None = None
    """Its `replay_endpoint`, as the router reaches it: what was missed is asked for there."""
    bootstrap_port: Port | None = None
    """Of a prefiller with handoff mooncake: VLLM_MOONCAKE_BOOTSTRAP_PORT there; 8998 if not given."""
    transfer_port: Port = 0
    """Where the segment is served over tcp; 0: any free one, which a firewall cannot know."""
    segment: ByteSize = ByteSize(512 << 20)
    """The node's share of the store, in main memory. It is all taken at start."""
    hugepages: bool = False
    """Huge pages for the segment: reserved ones, else transparent ones; it is an error if there are neither."""
    numa_node: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Where the segment's memory is to lie; anywhere if not given."""
    engine: EngineConfig | None = None
    """Overrides the cluster's."""
    host_id: str | None = None
    """Overrides how nodes tell whether they share memory (containers, tests)."""
    disk: DiskTierConfig | None = None
    """Overrides `tiers.disk`: where this machine's disk is."""


class ServiceConfig(Section, frozen=True, kw_only=True):
    """What holds for every process."""

    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """After the first SIGTERM a node's legs under way have this long, and the open replies of every server. What the
    router's requests have is `router.drain_s`."""
    start_s: Seconds = 120.0
    """An engine that is not ready after this long counts as failed. vLLM may need half an hour."""
    log_level: LogLevel = "info"
    """Of our own lines; libraries speak from warning up."""


class ClusterConfig(Section, frozen=True, kw_only=True):
    """A whole cluster file."""

    cluster: Text
    """Its name, in logs, in status, and in the folder of the logs."""
    handoff: HandoffKind = HandoffKind.KVFERRY
    """How KV gets from a prefiller to a decoder, and whether the nodes are ours."""
    model: ModelConfig
    """The model that is served; one a cluster."""
    engine: EngineConfig | None = None
    """Must be given with handoff kvferry and only there: the engines are ours then."""
    routers: list[Text] = msgspec.field(default_factory=list)
    """HOST:PORT of more routers, beside the one of `router` and alike but for the address. Each serves every request;
    what tenants have used, all of them count."""
    nodes: dict[str, NodeConfig]
    """By name, which `--node NAME` takes. At least one decoder; prefillers and stores are optional."""
    kv: KVConfig = KVConfig()
    """How KV is cut and checked."""
    transport: TransportConfig = TransportConfig()
    """Short form in YAML: `transport: tcp`, with `devices: [...]` beside it."""
    store: StoreConfig = StoreConfig()
    """Allocation and leases."""
    tiers: TiersConfig = TiersConfig()
    """Where chunks are kept beyond the nodes' memory."""
    metadata_server: MetadataServerConfig = MetadataServerConfig()
    """Where it listens, and its bounds."""
    router: RouterConfig = RouterConfig()
    """Where it listens, how it chooses, its bounds."""
    service: ServiceConfig = ServiceConfig()
    """What holds for every process."""
    security: SecurityConfig = SecurityConfig()
    """Who is trusted, and by what."""
