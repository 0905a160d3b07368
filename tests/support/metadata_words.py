"""Short ways to say what tests tell a metadata state or client."""

from typing import Any

import msgspec

from kvcore.config.schema import StoreConfig
from kvcore.eviction.quotas import TenantShares
from kvcore.identity import ClusterIdentity
from kvcore.types import ChunkKey, NodeInfo, OwnerTag, ReplicaRef, Role, Segment
from metadata_server.account_messages import ImportRequest
from metadata_server.index.limits import IndexLimits
from metadata_server.index.state import MetadataState
from metadata_server.messages import (
    ManifestEntry,
    RegisterRequest,
    ReplicaIds,
    ReserveItem,
    ReserveReply,
    ReserveRequest,
    SegmentManifest,
)
from metadata_server.versions import SPOKEN, Protocols

UNIT = 4096
TTL_S = 5.0
FIRST_GENERATION = 1 << 40


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "little"))


def keys(*numbers: int) -> list[ChunkKey]:
    return [key(number) for number in numbers]


def segment(node_id: str, units: int = 16, incarnation: int = 1) -> Segment:
    name = f"{node_id}.{incarnation:x}"
    return Segment(id=name, node_id=node_id, size_bytes=units * UNIT, host_id="h", addresses={"tcp": f"{node_id}:1"})


def registration(
    node_id: str,
    units: int = 16,
    incarnation: int = 1,
    entries: list[ManifestEntry] | None = None,
    ttl_s: float = TTL_S,
    *,
    role: Role = Role.DECODER,
) -> RegisterRequest:
    """A node with one segment; `units` 0: without."""
    manifests = [SegmentManifest(segment=segment(node_id, units, incarnation), entries=entries or [])] if units else []
    info = NodeInfo(id=node_id, role=role, control_url=f"http://{node_id}", incarnation=incarnation)
    return RegisterRequest(node=info, segments=manifests, ttl_s=ttl_s)


def reservation(
    node_id: str,
    numbers: list[int],
    *,
    units: int = 1,
    prefer: str | None = None,
    incarnation: int = 1,
    ttl_s: float = 60.0,
    owner: OwnerTag | None = None,
) -> ReserveRequest:
    items = [ReserveItem(key=key(number), length=units * UNIT) for number in numbers]
    request = ReserveRequest(node_id=node_id, incarnation=incarnation, items=items, prefer_segment=prefer, ttl_s=ttl_s)
    return request if owner is None else msgspec.structs.replace(request, owner=owner)


def entry(number: int, at: int, generation: int = 1, units: int = 1) -> ManifestEntry:
    """Chunk `number`, found at unit `at`."""
    return ManifestEntry(key=key(number), offset=at * UNIT, length=units * UNIT, generation=generation)


def in_pieces(request: RegisterRequest) -> RegisterRequest:
    """The same registration, but what lies in the segments is told later."""
    return msgspec.structs.replace(request, in_pieces=True)


def piece(
    node_id: str, number: int, entries: list[ManifestEntry], *, last: bool = False, incarnation: int = 1
) -> ImportRequest:
    """A piece of what lies in the node's segment."""
    return ImportRequest(
        node_id=node_id,
        incarnation=incarnation,
        segment_id=f"{node_id}.{incarnation:x}",
        number=number,
        entries=entries,
        last=last,
    )


def granted(reply: ReserveReply) -> list[ReplicaRef]:
    return [outcome.replica for outcome in reply.outcomes if outcome.replica is not None]


def ids(node_id: str, replicas: list[ReplicaRef], incarnation: int = 1) -> ReplicaIds:
    return ReplicaIds(node_id=node_id, incarnation=incarnation, replica_ids=[replica.id for replica in replicas])


def new_state(
    event_log: int = 1024,
    epoch: str = "e1",
    first_generation: int = FIRST_GENERATION,
    *,
    speaks: Protocols = SPOKEN,
    limits: IndexLimits = IndexLimits(),
    identity: ClusterIdentity = ClusterIdentity(),
    shares: TenantShares | None = None,
    **settings: Any,
) -> MetadataState:
    config = StoreConfig(**{"high_watermark": 1.0, "low_watermark": 0.5, "retire_grace_s": 2.0, **settings})
    return MetadataState(
        config,
        TTL_S,
        epoch,
        first_generation,
        event_log=event_log,
        identity=identity,
        speaks=speaks,
        limits=limits,
        shares=shares,
    )


def put(state: MetadataState, node_id: str, numbers: list[int], now: float, **how: Any) -> list[ReplicaRef]:
    """Reserve and commit what is granted."""
    replicas = granted(state.reserve(reservation(node_id, numbers, **how), now))
    assert all(state.commit(ids(node_id, replicas, how.get("incarnation", 1)), now).committed)
    return replicas


def stored(state: MetadataState, numbers: list[int], now: float) -> list[int]:
    """Which of the chunks are complete, asked one by one without touching anything."""
    return [number for number in numbers if state.complete_prefix([key(number)], now)]
