"""A store over one in-process segment a node, with switches for what may fail. Metadata: see `FakeMetadata`."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from kvcore.clock import Clock, SystemClock
from kvcore.config import StoreConfig
from kvcore.errors import MetadataUnavailableError
from kvcore.types import ChunkKey, KVSpec, ReplicaRef, Segment
from kvstore.store import KVStore
from kvstore.types import run_inline
from metadata_server.client import MetadataClient
from metadata_server.messages import (
    CommitReply,
    MatchReply,
    MatchRequest,
    QuarantineItem,
    QuarantineRequest,
    ReleaseRequest,
    ReplicaIds,
    ReserveOutcome,
    ReserveReply,
    ReserveRequest,
    ReserveStatus,
    WaitRequest,
)
from transfer.base import TransferEngine

CHUNK_BYTES = 1000
SPEC = KVSpec(
    model_id="m",
    weights_digest="w",
    tokenizer_digest="t",
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    dtype="float32",
    attention="a",
    layout_id="l",
    chunk_tokens=4,
    chunk_bytes=CHUNK_BYTES,
)


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "little"))


class FakeMetadata:
    """The least metadata server: grants in order, never evicts, never forgets. `dispatch` is MetadataCore's."""

    def __init__(self, max_replicas: int = 2) -> None:
        self.max_replicas = max_replicas
        self.segments: dict[str, Segment] = {}
        self.ends: dict[str, int] = {}
        self.complete: dict[ChunkKey, list[ReplicaRef]] = {}
        self.reserved: dict[int, ReplicaRef] = {}
        self.leases: set[int] = set()
        self.quarantined: list[QuarantineItem] = []
        self._last_id = 0

    def add_segment(self, segment: Segment) -> None:
        self.segments[segment.id] = segment
        self.ends[segment.id] = 0

    async def dispatch(self, path: str, body: bytes) -> bytes:
        match path:
            case "/v1/objects/match":
                request = msgspec.msgpack.decode(body, type=MatchRequest)
                return msgspec.msgpack.encode(self._match(request.keys))
            case "/v1/objects/wait":
                wait = msgspec.msgpack.decode(body, type=WaitRequest)
                return msgspec.msgpack.encode(self._match(wait.keys))
            case "/v1/leases/release":
                self.leases.difference_update(msgspec.msgpack.decode(body, type=ReleaseRequest).lease_ids)
            case "/v1/objects/reserve":
                return msgspec.msgpack.encode(self._reserve(msgspec.msgpack.decode(body, type=ReserveRequest)))
            case "/v1/objects/commit":
                ids = msgspec.msgpack.decode(body, type=ReplicaIds).replica_ids
                return msgspec.msgpack.encode(CommitReply(committed=[self._commit(number) for number in ids]))
            case "/v1/objects/abort":
                for number in msgspec.msgpack.decode(body, type=ReplicaIds).replica_ids:
                    self.reserved.pop(number, None)
            case "/v1/objects/quarantine":
                for item in msgspec.msgpack.decode(body, type=QuarantineRequest).items:
                    self.quarantined.append(item)
                    left = [r for r in self.complete.get(item.replica.key, []) if r.id != item.replica.id]
                    self.complete[item.replica.key] = left
            case _:
                raise AssertionError(path)
        return b""

    def _match(self, keys: list[ChunkKey]) -> MatchReply:
        found = []
        for wanted in keys:
            if not self.complete.get(wanted):
                break
            found.append(self.complete[wanted])
        lease = self._next_id() if found else 0
        self.leases |= {lease} - {0}
        return MatchReply(replicas=found, lease_id=lease, segments=list(self.segments.values()))

    def _reserve(self, request: ReserveRequest) -> ReserveReply:
        outcomes = [self._reserve_one(item.key, item.length, request.prefer_segment) for item in request.items]
        return ReserveReply(outcomes=outcomes, segments=list(self.segments.values()))

    def _reserve_one(self, wanted: ChunkKey, length: int, prefer: str | None) -> ReserveOutcome:
        if self.complete.get(wanted):
            return ReserveOutcome(status=ReserveStatus.EXISTS)
        if sum(replica.key == wanted for replica in self.reserved.values()) >= self.max_replicas:
            return ReserveOutcome(status=ReserveStatus.BUSY)
        for name in sorted(self.segments, key=lambda name: name != prefer):
            offset = -(-self.ends[name] // 4096) * 4096
            if offset + length <= self.segments[name].size_bytes:
                self.ends[name] = offset + length
                number = self._next_id()
                replica = ReplicaRef(
                    id=number, key=wanted, segment_id=name, offset=offset, length=length, generation=number
                )
                self.reserved[number] = replica
                return ReserveOutcome(status=ReserveStatus.GRANTED, replica=replica)
        return ReserveOutcome(status=ReserveStatus.FULL)

    def _commit(self, number: int) -> bool:
        replica = self.reserved.pop(number, None)
        if replica is not None:
            self.complete.setdefault(replica.key, []).append(replica)
        return replica is not None

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id


class Wire:
    """MetadataTransport to a `dispatch` in this process. `down`: paths that fail ("" for all); `gates`: what a call of
    a path waits for, before or after the server has acted."""

    def __init__(self, dispatch: Callable[[str, bytes], Awaitable[bytes]]) -> None:
        self._dispatch = dispatch
        self.down: set[str] = set()
        self.before: dict[str, asyncio.Event] = {}
        self.after: dict[str, asyncio.Event] = {}
        self.arrived: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.calls: list[str] = []

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        name = path.rpartition("/")[2]
        self.calls.append(name)
        self.arrived[name].set()
        try:
            async with asyncio.timeout(timeout_s):
                if gate := self.before.get(name):
                    await gate.wait()
                if name in self.down or "" in self.down:
                    raise MetadataUnavailableError("switched off")
                reply = await self._dispatch(path, body)
                if gate := self.after.get(name):
                    await gate.wait()
                return reply
        except TimeoutError as error:
            raise MetadataUnavailableError("too late") from error

    async def aclose(self) -> None:
        pass


@dataclass
class World:
    """Nodes `a`, `b`, ... with one segment each, a metadata server, and stores on top."""

    metadata: FakeMetadata = field(default_factory=FakeMetadata)
    memory: dict[str, memoryview] = field(default_factory=dict)
    clock: Clock = field(default_factory=SystemClock)
    stores: list[KVStore] = field(default_factory=list)

    def add_node(self, name: str, size_bytes: int = 1 << 20, kind: str = "inproc", host_id: str = "h") -> Segment:
        segment = Segment(
            id=f"{name}.1", node_id=name, size_bytes=size_bytes, host_id=host_id, addresses={kind: "here"}
        )
        self.memory[segment.id] = memoryview(bytearray(size_bytes))
        self.metadata.add_segment(segment)
        return segment

    def store(
        self,
        node: str,
        transfer: TransferEngine,
        config: StoreConfig | None = None,
        spec: KVSpec = SPEC,
        verify: bool = True,
    ) -> tuple[KVStore, Wire]:
        wire = Wire(self.metadata.dispatch)
        store = KVStore(
            spec=spec,
            node_id=node,
            incarnation=1,
            metadata=MetadataClient(wire, self.clock, 5.0),
            transfer=transfer,
            host_id="h",
            clock=self.clock,
            config=config,
            verify=verify,
            run_blocking=run_inline,
        )
        self.stores.append(store)
        return store, wire

    async def aclose(self) -> None:
        for store in self.stores:
            await store.aclose()
