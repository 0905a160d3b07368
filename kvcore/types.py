"""The words of kvferry, as frozen values. Every package speaks in these; none has behaviour beyond derivation."""

from enum import StrEnum
from hashlib import sha256
from typing import Annotated, NewType

import msgspec

ChunkKey = NewType("ChunkKey", bytes)
"""16 bytes naming the KV of a chunk and all before it; see `kvcore.chunk_keys`."""

OwnerTag = NewType("OwnerTag", bytes)
"""8 bytes that stand for a tenant, where its salt must not be known; see `kvcore.chunk_keys`."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
"""In what others send us: no tokenizer takes other numbers."""


class Role(StrEnum):
    """What a node does."""

    PREFILLER = "prefiller"
    DECODER = "decoder"
    STORE = "store"
    """Memory without an engine."""


DeclaredKV = tuple[tuple[str, str], ...]
"""As `KVSpec.declared`."""


class KVSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What makes two KV caches interchangeable. Equal specs: each can use the other's bytes."""

    model_id: str
    weights_digest: str
    """Hex digest over the weight files."""
    tokenizer_digest: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    """Of the KV, e.g. `float32`."""
    attention: str
    """Canonical text of the rope and attention settings that K and V depend on."""
    layout_id: str
    """How the payload's bytes are ordered, e.g. `paged.L2BHD.b64` (see docs/wire-formats.md)."""
    chunk_tokens: int
    chunk_bytes: int
    """Payload of one full chunk in bytes, without its header."""
    tp_rank: int = 0
    tp_size: int = 1
    declared: DeclaredKV = ()
    """(name, value) of settings that make it another kind of KV, sorted by name, as the cluster file or vLLM has them:
    also those that do not show in the fields above. `kvcore.kv_parts` compares specs by name."""

    @property
    def fingerprint(self) -> bytes:
        """16 bytes: digest over every field, by name, in sorted order."""
        return sha256(b"kvferry.spec.v1" + msgspec.json.encode(self, order="sorted")).digest()[:16]

    @property
    def title(self) -> str:
        """For people: what tells it from other kinds of KV as a rule."""
        return f"{self.model_id}, {self.dtype}, weights {self.weights_digest[:8]}"


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A registered memory region on a node that others read and write one-sidedly."""

    id: str
    """Unique for ever: `<node id>.<incarnation in hex>`."""
    node_id: str
    size_bytes: int
    host_id: str
    """Equal on two nodes iff they can map each other's memory."""
    addresses: dict[str, str]
    """Transport name -> how to reach the segment by it (`shm`, `tcp`, `ucx`, `nixl`, `inproc`)."""


class NodeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A node as it announces itself. What is empty is not known, or (but for `cluster`) the node has no engine."""

    id: str
    role: Role
    control_url: str
    incarnation: int
    """Drawn anew at each start; it only tells one start from another. What an earlier one held is dead."""
    fingerprint: bytes = b""
    """Of the engine's KVSpec. Those of one cluster may differ: their KV is kept apart by its keys."""
    cluster: str = ""
    """Its name in the node's cluster file, and …"""
    model: str = ""
    """… `model.name` there."""
    tokenizer_digest: str = ""
    """Of the engine's KVSpec."""
    protocol: int = 1
    """The newest version of the nodes' API that it speaks, for other nodes that call it."""


class ReplicaRef(msgspec.Struct, frozen=True, gc=False):
    """Where one complete (or, to its writer, reserved) copy of a chunk lies. The metadata server makes hundreds of
    thousands a second, by position: that takes a third of the time."""

    id: int
    """Unique within one epoch of the metadata server."""
    key: ChunkKey
    segment_id: str
    offset: int
    length: int
    """Header and payload, bytes."""
    generation: int
    """Written in the chunk's header; grows with every reservation, across restarts of the metadata server too."""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The chosen nodes of one request and why."""

    prefiller: str | None
    decoder: str
    expected_cached_tokens: int
    reason: str
    expected_promoted_tokens: int = 0
    """Of those, that are in no node's memory yet, and come from a tier."""
