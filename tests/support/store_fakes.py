"""A store over one in-process segment a node, with a metadata server's core, and switches for what may fail."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from kvcore.clock import Clock, SystemClock
from kvcore.config.schema import StoreConfig
from kvcore.errors import MetadataUnavailableError, OverloadedError
from kvcore.types import ChunkKey, KVSpec, NodeInfo, ReplicaRef, Role, Segment
from kvstore.integrity.checks import Integrity
from kvstore.limits import StoreLimits
from kvstore.store import KVStore
from kvstore.types import GetOutcome, run_inline
from metadata_server.account_messages import Stats
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.index.state import MetadataState
from metadata_server.messages import ManifestEntry, QuarantineItem, QuarantineRequest, RegisterRequest, SegmentManifest
from transfer.base import TransferEngine

CHUNK_BYTES = 1000


@dataclass(frozen=True)
class Stored:
    """A replica of the index: its row, and what readers are told."""

    row: int
    ref: ReplicaRef


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
                try:
                    reply = await self._dispatch(path, body)
                except OverloadedError as error:
                    raise MetadataUnavailableError(error.message) from error
                if gate := self.after.get(name):
                    await gate.wait()
                return reply
        except TimeoutError as error:
            raise MetadataUnavailableError("too late") from error

    async def aclose(self) -> None:
        pass


class World:
    """Nodes `a`, `b`, ... with one segment each, a metadata server's core, and stores on top.

    `quarantined` is all that was ever reported; `wires` are the stores' ways to the metadata server.
    """

    def __init__(self) -> None:
        self.clock: Clock = SystemClock()
        self.config = StoreConfig(retire_grace_s=0.0)
        """The metadata server's."""
        self.limits = StoreLimits()
        self.integrity = Integrity()
        self.memory: dict[str, memoryview] = {}
        self.segments: list[Segment] = []
        self.stores: list[KVStore] = []
        self.quarantined: list[QuarantineItem] = []
        self.restart_metadata()

    def restart_metadata(self, *, epoch: str = "1", first_generation: int = 1 << 20) -> None:
        """A new life of the metadata server, which knows nothing."""
        self.state = MetadataState(self.config, 3600.0, epoch, first_generation)
        self.core = MetadataCore(self.state, self.clock)

    def use(self, clock: Clock, config: StoreConfig | None = None) -> None:
        """Let time be this clock's, and the metadata server's configuration this. Before anything else is done."""
        self.clock = clock
        self.config = config or self.config
        self.restart_metadata()

    async def dispatch(self, path: str, body: bytes) -> bytes:
        if path == "/v1/objects/quarantine":
            self.quarantined += msgspec.msgpack.decode(body, type=QuarantineRequest).items
        return await self.core.dispatch(path, body)

    def add_node(self, name: str, size_bytes: int = 1 << 20, kind: str = "inproc", host_id: str = "h") -> Segment:
        segment = Segment(
            id=f"{name}.1", node_id=name, size_bytes=size_bytes, host_id=host_id, addresses={kind: "here"}
        )
        self.memory[segment.id] = memoryview(bytearray(size_bytes))
        self.segments.append(segment)
        self.register(segment)
        return segment

    def register(self, segment: Segment, entries: Sequence[ManifestEntry] = ()) -> None:
        """The node of `segment` joins with what it says lies there."""
        node = NodeInfo(id=segment.node_id, role=Role.STORE, control_url="http://here", incarnation=1)
        manifests = [SegmentManifest(segment=segment, entries=list(entries))]
        self.state.register(RegisterRequest(node=node, segments=manifests, ttl_s=3600), self.clock.now())

    def stats(self) -> Stats:
        return self.state.stats(self.clock.now(), self.core.num_waiters)

    def replicas(self, wanted: ChunkKey) -> list["Stored"]:
        """What the index has of the chunk."""
        rows = self.state._index.rows(wanted)
        return [Stored(row, ref) for row, ref in zip(rows, self.state._index.refs(rows), strict=True)]

    def store(
        self,
        node: str,
        transfer: TransferEngine,
        config: StoreConfig | None = None,
        spec: KVSpec = SPEC,
        integrity: Integrity | None = None,
    ) -> tuple[KVStore, Wire]:
        wire = Wire(self.dispatch)
        store = KVStore(
            spec=spec,
            node_id=node,
            incarnation=1,
            metadata=MetadataClient(wire, self.clock, 5.0),
            transfer=transfer,
            host_id="h",
            clock=self.clock,
            config=config,
            integrity=integrity or self.integrity,
            run_blocking=run_inline,
            limits=self.limits,
        )
        self.stores.append(store)
        return store, wire

    async def aclose(self) -> None:
        for store in self.stores:
            await store.aclose()


KEYS = [key(number) for number in range(1, 4)]


def payload(number: int) -> bytes:
    return bytes([number]) * CHUNK_BYTES


def views(number: int) -> list[memoryview]:
    """A payload as it lies in two KV blocks."""
    whole = memoryview(payload(number))
    return [whole[:300], whole[300:]]


def buffers(count: int) -> list[list[memoryview]]:
    return [[memoryview(bytearray(700)), memoryview(bytearray(300))] for _ in range(count)]


async def put(store: KVStore, keys: Sequence[ChunkKey] = KEYS, prefer: str | None = None) -> list[ChunkKey]:
    async with await store.begin_put(keys, prefer_segment=prefer, timeout_s=5) as session:
        for number, wanted in enumerate(keys):
            await session.write(wanted, 4, views(number), timeout_s=5)
        return await session.commit(timeout_s=5)


async def get(
    store: KVStore, keys: Sequence[ChunkKey] = KEYS, timeout_s: float = 5
) -> tuple[list[GetOutcome], list[bytes]]:
    match = await store.match(keys, timeout_s=5)
    into = buffers(match.num_chunks)
    result = await store.get_into(match, 0, into, timeout_s=timeout_s)
    await store.release(match)
    return result.outcomes, [b"".join(chunk) for chunk in into]


def replica(world: World, number: int = 0, which: int = 0) -> ReplicaRef:
    return world.replicas(KEYS[number])[which].ref


def lie(world: World, number: int = 0, **changes: int) -> None:
    """From now on the metadata server says this of the chunk's only replica."""
    (replica,) = world.replicas(KEYS[number])
    table = world.state._index.table
    columns = {"generation": table.generations, "offset": table.offsets, "length": table.lengths}
    for name, value in changes.items():
        columns[name][replica.row] = value


async def put_twice(*stores: KVStore, prefer: tuple[str, str] = ("a.1", "b.1")) -> None:
    """Chunk 0 into two segments, by two writers at the same time."""
    sessions = [
        await stores[number % len(stores)].begin_put(KEYS[:1], prefer_segment=segment, timeout_s=5)
        for number, segment in enumerate(prefer)
    ]
    for session in sessions:
        assert await session.write(KEYS[0], 4, views(0), timeout_s=5)
        assert await session.commit(timeout_s=5) == KEYS[:1]
        await session.aclose()
