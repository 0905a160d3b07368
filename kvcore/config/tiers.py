"""The `tiers` of a cluster file: where chunks are kept beyond the nodes' segments. Values only."""

from typing import Annotated, Literal

import msgspec

from kvcore.config.fields import ByteSize, Count, Seconds, Section, Text
from kvcore.eviction.evictor import PolicyName

Admission = Literal["always", "second_use"]
Codec = Literal["none", "lossless", "int8"]


class TierConfig(Section, frozen=True, kw_only=True):
    """What every tier has."""

    admission: Admission = "always"
    """`always`: each chunk that is computed. `second_use`: those of prompts that come a second time."""
    ttl_s: Seconds | None = None
    """A chunk is forgotten so long after it was saved. Not set: it is kept until room is needed."""
    timeout_s: Seconds = 2.0
    """For one call; what a request waits for a tier is bounded by `tiers.wait_s` besides."""
    codec: Codec = "none"
    """How chunks are made smaller there. `lossless` needs `kvferry[codec]`. `int8` is lossy: the whole cluster's KV is
    another kind then, which shares nothing with others'."""
    encrypt: bool = False
    """AES-256-GCM under a key of each tenant, for who can read what lies there. Needs `security.secret`."""
    in_flight: ByteSize = ByteSize(256 << 20)
    """Bytes on their way to and from the tier at once, of one node."""


class DiskTierConfig(TierConfig, frozen=True, kw_only=True):
    """A file on a node's own disk, all taken at start. What lies there outlives the node's process."""

    path: Text
    """Folder of the file; `{node}` in it is the node's name. Nodes of one machine have files of their own."""
    size: ByteSize
    """Of the file of each node."""
    eviction: PolicyName = "lru"
    """Which chunk goes first where room is needed, as `store.eviction` says it of segments."""
    buffered: bool = False
    """Through the page cache instead of past it (O_DIRECT): faster where memory is left over, twice the bytes."""


class RedisTierConfig(TierConfig, frozen=True, kw_only=True):
    """A Redis or Valkey, shared by all nodes and by other clusters."""

    url: Text
    """`redis://[USER:PASSWORD@]HOST:PORT[/DB]`, or `rediss://` for TLS; `redis-sentinel://HOST:PORT,.../SERVICE[/DB]`;
    `redis-cluster://HOST:PORT,...`. A password may also be in the environment."""
    connections: Count = 2
    """That carry chunks, of one node."""


class ObjectTierConfig(TierConfig, frozen=True, kw_only=True):
    """A bucket of S3, GCS or Azure, or a folder, shared by all nodes and by other clusters. Needs `kvferry[object]`."""

    url: Text
    """`s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX` or `file:///FOLDER`. Credentials are taken
    from the environment."""
    endpoint: Text | None = None
    """`http://minio:9000`: of a server that speaks the provider's language. Not set: the provider's own."""
    region: Text | None = None
    """Of an S3 bucket. Not set: the environment's, else `us-east-1`."""
    timeout_s: Seconds = 5.0
    """For one call; what a request waits for a tier is bounded by `tiers.wait_s` besides."""
    connections: Count = 8
    """Chunks on their way at once, of one node."""


class MooncakeTierConfig(TierConfig, frozen=True, kw_only=True):
    """Mooncake's store, shared by all nodes and by other clusters. Its bytes lie in memory that its clients lend."""

    in_flight: ByteSize = ByteSize(128 << 20)
    """As in each tier; here it is a buffer of that size too, and no larger chunk is kept."""
    master: Text
    """`HOST:PORT` of `mooncake_master`."""
    metadata_server: Text = "P2PHANDSHAKE"
    """Of Mooncake's own: `http://HOST:PORT/metadata`, `etcd://HOST:PORT`. `P2PHANDSHAKE`: its clients need none."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Between Mooncake's clients."""
    rdma_devices: list[Text] = msgspec.field(default_factory=list)
    """With `rdma`: those to use, such as `mlx5_0`. Empty: Mooncake chooses."""
    local_hostname: Text | None = None
    """By which Mooncake's other clients reach this node. Not set: the node's `host`, or, where that is loopback and
    the master is not, the address from which the master is reached."""
    global_segment_size: ByteSize | None = None
    """Memory that each node lends to Mooncake, beside its own segment. Not set: none, others lend."""
    local_buffer_size: ByteSize | None = None
    """Memory for Mooncake's own copies, of each node. kvferry needs none."""


class TiersConfig(Section, frozen=True, kw_only=True):
    """Where chunks are kept beyond the nodes' memory. They are asked in the order of their measured speed."""

    disk: DiskTierConfig | None = None
    """On each node's own disk."""
    redis: RedisTierConfig | None = None
    """A Redis or Valkey server."""
    object: ObjectTierConfig | None = None
    """A bucket, or a folder that all nodes see."""
    mooncake: MooncakeTierConfig | None = None
    """Mooncake's store."""
    wait_s: Seconds = 5.0
    """A request waits at most so long for chunks from tiers; what has not come by then is computed."""
    warm_up: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    """After a start, the share of a node's segment that is filled with what its disk's most used chunks are."""
