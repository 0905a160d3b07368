"""Simulated machines: the metadata server and nodes, made of production parts, to be killed and started again.

Owns segment memory and process lives. A node's segment outlives its engine and dies with the node.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
from support.sim_http import SimHttp
from support.sim_loop import LoopClock
from support.sim_network import SimNetwork, SimProcess
from support.sim_owner import NetworkOwner
from support.sim_tiers import SimTiers
from support.sim_ways import (
    METADATA,
    NodeService,
    SimEventSource,
    SimMetadataTransport,
    SimNodeClient,
    metadata_app,
    node_app,
)

from engines.paged.loop import EngineLoop
from engines.paged.options import EngineOptions
from engines.paged.runner import StepOutput, StepSlice
from engines.sim.runner import SimRunner, sim_spec
from kvcore.config.schema import SimEngineConfig, StoreConfig
from kvcore.errors import (
    EngineDiedError,
    KVFerryError,
    NodeUnavailableError,
    PeerUnreachableError,
    TransferError,
    TransferTimeoutError,
)
from kvcore.eviction.quotas import TenantShares
from kvcore.identity import ClusterIdentity
from kvcore.partitions import Part
from kvcore.types import NodeInfo, Role, Segment
from kvnode.control_api import said_by
from kvnode.limits import NodeLimits
from kvnode.moving import ChunkMover
from kvnode.partitions.memberships import Memberships
from kvnode.tasks import cancelled
from kvnode.tiers.node_tiers import NodeTiers, open_node_tiers
from kvnode.tiers.own_segment import OwnSegment
from kvnode.tiers.peers import PeerDisks
from kvstore.chunk_format import HEADER_BYTES
from kvstore.integrity.checks import Integrity
from kvstore.manifest import scan
from kvstore.placement import Placement
from kvstore.store import KVStore
from kvstore.types import run_inline
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.index.state import MetadataState
from metadata_server.messages import SegmentManifest
from metadata_server.partitions.subscription import PartitionedSubscription
from metadata_server.subscription import IndexSink, IndexSubscription
from metadata_server.versions import SPOKEN
from nodeapi.adapters import ServedAdapter
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.messages import (
    PROTOCOL,
    GenerateRequest,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    PromoteReply,
    PromoteRequest,
    TokenDelta,
)
from transfer.base import Direction, TransferEngine, TransferOp
from transfer.inproc import InprocFault, InprocTransfer

CLUSTER, MODEL = "sim", "m"
CALL_S = 1.0
STORE_S = 30.0
_Leg = TypeVar("_Leg", PrefillRequest, GenerateRequest)


@dataclass(slots=True)
class DataFaults:
    """How often what happens to one transfer op, or to what it wrote."""

    fail: float = 0.02
    torn: float = 0.02
    late: float = 0.02
    flip: float = 0.03
    """A byte of what was written changes later."""
    slow: float = 0.05


@dataclass
class SimSetup:
    """What all simulated machines share. `integrity`: another one for a mutant without checksums, or for MACs."""

    network: SimNetwork
    clock: LoopClock
    engine: SimEngineConfig
    store: StoreConfig
    chunk_tokens: int
    segment_bytes: int
    node_ttl_s: float
    data: DataFaults
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the segments of nodes that have other than `segment_bytes`."""
    adapters: Mapping[str, Sequence[ServedAdapter]] = field(default_factory=dict)
    """That each node serves."""
    integrity: Integrity = Integrity()
    revisions: tuple[str, ...] = ()
    """Of the weights: nodes that start again have one of these. Empty: all have what `engine` says."""
    memory: dict[str, memoryview] = field(default_factory=dict)
    store_counts: Counter[str] = field(default_factory=Counter)
    """Of all stores that were closed."""
    engine_counts: Counter[str] = field(default_factory=Counter)
    tiers: SimTiers | None = None
    moves: NodeLimits | None = None
    """Of movers; None: nodes have none."""
    nodes: dict[str, NodeService] = field(default_factory=dict)
    """By host."""
    http: SimHttp | None = None
    """None: processes call each other without it."""
    owned: NetworkOwner | None = None
    """Who owns a node's network; it needs `http`."""


SinkOf = Callable[[Part | None], IndexSink]
Subscription = IndexSubscription | PartitionedSubscription


class SimMetadata:
    """The metadata server, or one of several partitions' (`sim_partitions`). A restart forgets everything."""

    def __init__(self, setup: SimSetup, part: Part | None = None, host: str = METADATA) -> None:
        self._setup = setup
        self._speaks = replace(SPOKEN, part=part)
        self.host = host
        self.lives = 0
        self.clock_off_s = 0.0
        self.process = SimProcess(host)
        self.process.alive = False
        self.counts: Counter[str] = Counter()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self.process.alive

    def start(self) -> None:
        """A new life."""
        setup = self._setup
        self.lives += 1
        wall_ms = int((setup.clock.wall() + self.clock_off_s) * 1000)
        state = MetadataState(
            setup.store,
            setup.node_ttl_s,
            f"e{self.lives}",
            wall_ms << 20,
            event_log=256,
            identity=ClusterIdentity(CLUSTER, MODEL),
            speaks=self._speaks,
        )
        self.core = MetadataCore(state, setup.clock)
        self.process = SimProcess(self.host)
        setup.network.hosts[self.host] = self.process
        if setup.http is not None:
            setup.http.serves(self.process, *metadata_app(self.core))
        self.process.spawn(self.core.run())

    def kill(self) -> None:
        """State lost."""
        self.counts += self.core.state.counters
        self.process.kill()

    @property
    def cores(self) -> list[MetadataCore]:
        """Of all partitions."""
        return [self.core]

    def end(self) -> None:
        """For good."""
        self.kill()

    async def gone(self) -> None:
        """Wait for what was killed last."""
        await self.process.gone()

    def connect(self, process: SimProcess) -> MetadataClient:
        """A client for a process."""
        setup = self._setup
        way = SimMetadataTransport(setup.network, process, self._answer, self.host, http=setup.http)
        return MetadataClient(way, self._setup.clock, CALL_S, speaks=self._speaks)

    def subscribe(self, process: SimProcess, sink_of: SinkOf) -> Subscription:
        """A process's event stream; run it there."""
        setup = self._setup
        source = SimEventSource(setup.network, process, self._events, self.host, http=setup.http)
        return IndexSubscription(source, sink_of(self._speaks.part), self._setup.clock, speaks=self._speaks)

    async def _answer(self, path: str, body: bytes) -> bytes:
        """What a call gets that reaches the life of now."""
        return await self.core.dispatch(path, body)

    def _events(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        return self.core.events(epoch, from_seq)

    def check(self) -> None:
        """Every invariant of the state."""
        if self.alive:
            self.core.state.check_invariants(self._setup.clock.now())


class SimNode(NodeService):
    """One node: its service process with membership and segment, and its engine's process."""

    def __init__(
        self,
        setup: SimSetup,
        metadata: SimMetadata,
        name: str,
        role: Role,
        *,
        host: str = "",
        engine: SimEngineConfig | None = None,
        cluster: str = CLUSTER,
        model: str = MODEL,
    ) -> None:
        """`name` is its id. Without `host` and `engine` it has a host of this name, and the cluster's engine."""
        self.name = name
        self.host = host or name
        self.clocked = False
        """Of an earlier version: its incarnations are from its machine's clock, and it does not say what it is."""
        self.clock_off_s = 0.0
        self.legs = 0
        self._moved_before = 0
        self._config = engine or setup.engine
        self._cluster, self._model = cluster, model
        self._setup = setup
        self._metadata = metadata
        self._role = role
        self._restarts = 0
        self.steps = asyncio.Event()
        """Cleared: its engines hang, and all else of the node goes on."""
        self.steps.set()
        self.engine: EngineLoop | None = None
        self.tiers: NodeTiers | None = None
        self.mover: ChunkMover | None = None
        self.subscription: Subscription | None = None
        self.on_promote: Callable[[str], None] = lambda _name: None
        """Told of each call of another node that wants chunks from this one's tiers."""
        self.service = self.engine_process = _dead(self.host)
        self._graves: list[SimProcess] = []

    @property
    def is_store(self) -> bool:
        """Whether it has no engine."""
        return self._role is Role.STORE

    @property
    def ready(self) -> bool:
        """Whether its engine serves, if it has one."""
        return self.service.alive and (self.engine is not None or self.is_store)

    def start(self) -> None:
        """A new incarnation with an empty segment."""
        setup = self._setup
        if setup.revisions:
            revision = setup.network.dice.choice(setup.revisions)
            self._config = msgspec.structs.replace(self._config, weights_version=revision)
        self.service = SimProcess(self.host)
        setup.network.hosts[self.host] = self.service
        if setup.http is not None:
            setup.http.serves(self.service, *node_app(self))
        incarnation = setup.network.dice.randrange(1, 1 << 53)
        if self.clocked:
            incarnation = int((setup.clock.wall() + self.clock_off_s) * 1000)
        segment_id, size = f"{self.name}.{incarnation:x}", setup.sizes.get(self.name, setup.segment_bytes)
        self.segment = Segment(
            id=segment_id,
            node_id=self.name,
            size_bytes=size,
            host_id=self.host,
            addresses={"inproc": self.host},
        )
        memory = setup.memory[segment_id] = memoryview(bytearray(size))

        async def manifests() -> list[SegmentManifest]:
            return [SegmentManifest(segment=self.segment, entries=scan(memory))]

        self._opened = asyncio.Event()
        self._node_client = self._client(self.service)
        self.membership = Memberships(
            self._node_client,
            NodeInfo(
                id=self.name,
                role=self._role,
                control_url=f"http://{self.host}:1",
                incarnation=incarnation,
                cluster="" if self.clocked else self._cluster,
                model="" if self.clocked else self._model,
                protocol=PROTOCOL,
            ),
            lambda: [self.segment],
            manifests,
            ttl_s=setup.node_ttl_s,
            draw=lambda: 0.5,
        )
        self.service.spawn(self.membership.run())
        if setup.moves is not None:
            self._start_mover(memory, setup.moves)
        if setup.tiers is None or not setup.tiers.of(self.name, self.service):
            self._opened.set()
        else:
            self.service.spawn(self._tiers_life(self.service, setup.tiers, memory))
        self.start_engine()

    def _start_mover(self, memory: memoryview, limits: NodeLimits) -> None:
        setup, membership, process = self._setup, self.membership, self.service
        self.mover = ChunkMover(
            memory,
            node=membership.node,
            metadata=self._node_client,
            open_transfer=lambda: _transfer(setup, process),
            wanted=lambda: membership.drained == "move" or membership.sheds,
            store=setup.store,
            clock=setup.clock,
            run_blocking=run_inline,
            limits=limits,
        )
        process.spawn(_until_killed(self.mover))

    def start_engine(self) -> None:
        """A new engine process on the same segment. A store has none."""
        if self.is_store:
            return
        self.engine_process = SimProcess(self.host)
        self.engine_process.spawn(self._engine_life(self.engine_process))

    def kill_engine(self) -> None:
        """The engine's process dies; what it had reserved is given back by the service."""
        self._restarts += 1
        self.engine = None
        self._bury(self.engine_process)
        self.service.spawn(self._engine_ended())

    @property
    def moved(self) -> int:
        """Chunks that it has moved elsewhere, in all of its lives."""
        return self._moved_before + (self.mover.moved if self.mover is not None else 0)

    def kill(self) -> None:
        """The whole node dies, segment and all."""
        self._moved_before, self.mover = self.moved, None
        self.engine = self.tiers = None
        self._bury(self.engine_process)
        self._bury(self.service)
        del self._setup.memory[self.segment.id]

    async def stop(self) -> None:
        """For good; and wait for all that was killed before."""
        self.engine_process.kill()
        self.service.kill()
        for process in [*self._graves, self.engine_process, self.service]:
            await process.gone()

    def check(self) -> None:
        """Every invariant of the engine of now."""
        if self.engine is not None:
            self.engine.check()

    def store(self, process: SimProcess) -> KVStore:
        """A store for a process of this node."""
        setup = self._setup
        return KVStore(
            spec=sim_spec(self._config, MODEL, setup.chunk_tokens),
            node_id=self.name,
            incarnation=self.membership.node.incarnation,
            metadata=self._client(process),
            transfer=_transfer(setup, process),
            host_id=self.host,
            clock=setup.clock,
            config=setup.store,
            integrity=setup.integrity,
            run_blocking=run_inline,
        )

    # --- the control API ---

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """See NodeService."""
        process = self.engine_process
        self.legs += 1
        self._engine()
        request, given = await self._promoted(request)
        try:
            result = await self._engine().prefill(request)
            if self.tiers is not None:
                self.tiers.after_leg(result)
            return msgspec.structs.replace(result, promoted=given.promoted, tier_choices=given.choices)
        except KVFerryError as error:
            raise (error if process.alive else EngineDiedError("the engine's process ended")) from error

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """See NodeService."""
        process, engine = self.engine_process, self._engine()
        request, given = await self._promoted(request)
        stream, fingerprint = engine.generate(request), engine.info.kv_spec.fingerprint
        self.legs += 1
        try:
            async for delta in stream:
                if not process.alive:
                    raise EngineDiedError("the engine's process ended")
                if self.tiers is not None and delta.info is not None:
                    self.tiers.after_leg(delta.info)
                yield said_by(delta, fingerprint, given)
        finally:
            await stream.aclose()

    async def end_handoff(self, request_id: str) -> None:
        """See NodeService."""
        await self._engine().end_handoff(request_id)

    async def abort(self, request_id: str) -> None:
        """See NodeService."""
        await self._engine().abort(request_id)

    async def compare(self, request: CompareRequest) -> CompareReply:
        """See NodeService."""
        process = self.engine_process
        try:
            return await self._engine().compare(request)
        except KVFerryError as error:
            raise (error if process.alive else EngineDiedError("the engine's process ended")) from error

    async def promote(self, request: PromoteRequest) -> PromoteReply:
        """See NodeService."""
        self.on_promote(self.name)
        return await self.tiers.promote(request) if self.tiers is not None else PromoteReply()

    async def report(self) -> NodeReport:
        """See NodeService."""
        engine = self.engine
        return NodeReport(
            node=self.membership.node,
            engine=engine.info if engine else None,
            stats=await engine.stats() if engine else None,
            segments=[self.segment],
            engine_restarts=self._restarts,
            refused=self.membership.refused,
            tiers=self.tiers.reports() if self.tiers is not None else [],
        )

    async def _promoted(self, request: _Leg) -> tuple[_Leg, PromoteReply]:
        return await self.tiers.before_leg(request) if self.tiers is not None else (request, PromoteReply())

    def _engine(self) -> EngineLoop:
        if self.engine is None:
            raise NodeUnavailableError("the node's engine is starting")
        return self.engine

    def _client(self, process: SimProcess) -> MetadataClient:
        return self._metadata.connect(process)

    async def _engine_life(self, process: SimProcess) -> None:
        await self._opened.wait()
        setup, store = self._setup, self.store(process)
        runner = _HangingRunner(self._config, setup.chunk_tokens, self.steps, setup.adapters.get(self.name, ()))
        engine = EngineLoop(runner, store, EngineOptions.of(self._config, STORE_S), setup.clock)
        try:
            async with engine:
                self.engine = engine
                self.membership.announce(engine.info.kv_spec)
                if self.tiers is not None:
                    self.tiers.engine_ready(engine.info.kv_spec)
                await setup.network.loop.create_future()
        finally:
            await store.aclose()
            setup.store_counts.update(store.counters())
            setup.engine_counts.update((await engine.stats()).counters)

    async def _engine_ended(self) -> None:
        writers = [self.mover.work] if self.mover is not None else []
        async with AsyncExitStack() as stack:
            for work in writers:
                await stack.enter_async_context(work.paused())
            if self.tiers is not None:
                await stack.enter_async_context(self.tiers.promoter.work.paused())
            await self.membership.release_writer()

    async def _tiers_life(self, process: SimProcess, sim: SimTiers, memory: memoryview) -> None:
        """As `kvnode.tiers.starting` wires them."""
        setup, node, client = self._setup, self.membership.node, self._node_client
        peers = PeerDisks(client, SimNodeClient(setup.network, process, setup.nodes, setup.http), node.id)
        placement = Placement(
            client, node_id=node.id, incarnation=node.incarnation, clock=setup.clock, config=setup.store
        )
        async with AsyncExitStack() as stack:
            tiers = await stack.enter_async_context(
                open_node_tiers(
                    [opened for opened, _ in sim.of(self.name, process)],
                    sim.config,
                    shares=TenantShares(setup.store.tenant_share),
                    node=node,
                    segment=OwnSegment(memory, self.segment.id, placement, setup.integrity),
                    placement=placement,
                    metadata=client,
                    clock=setup.clock,
                    run_blocking=run_inline,
                    peers=peers,
                    limits=sim.plan.limits,
                )
            )
            stack.callback(sim.count, tiers)
            self.membership.on_registered(tiers.registered)
            self.subscription = self._metadata.subscribe(process, tiers.filler.sink_of)
            following = asyncio.create_task(self.subscription.run())
            stack.push_async_callback(cancelled, following)
            self.tiers = tiers
            self._opened.set()
            await setup.network.loop.create_future()

    def _bury(self, process: SimProcess) -> None:
        process.kill()
        self._graves.append(process)


def _dead(name: str) -> SimProcess:
    process = SimProcess(name)
    process.alive = False
    return process


class _HangingRunner(SimRunner):
    def __init__(
        self, config: SimEngineConfig, chunk_tokens: int, steps: asyncio.Event, adapters: Sequence[ServedAdapter]
    ) -> None:
        super().__init__(config, MODEL, chunk_tokens, adapters=adapters)
        self._steps = steps

    async def execute(self, slices: Sequence[StepSlice]) -> StepOutput:
        await self._steps.wait()
        return await super().execute(slices)


def _transfer(setup: SimSetup, process: SimProcess) -> TransferEngine:
    """Of one process."""
    own = InprocTransfer(setup.memory, _Faults(setup, process))
    return own if setup.owned is None else setup.owned.around(own, process.name)


class _Faults:
    """The fault hook of one process's transfers."""

    def __init__(self, setup: SimSetup, process: SimProcess) -> None:
        self._setup = setup
        self._process = process

    async def __call__(self, direction: Direction, op: TransferOp) -> InprocFault | None:
        network, data = self._setup.network, self._setup.data
        dice, trace, here, there = network.dice, network.trace, self._process.name, op.segment.node_id
        if not self._process.alive:
            return InprocFault(PeerUnreachableError("dead"))
        if network.is_cut(here, there) or network.is_cut(there, here):
            await asyncio.sleep(0.3)
            trace("data_cut", here, there)
            return InprocFault(TransferTimeoutError("cut off"))
        if dice.random() < data.slow:
            await asyncio.sleep(dice.uniform(0, 0.2))
        else:
            await asyncio.sleep(0.0001)
        if not self._process.alive:  # it may have died in the middle of its copy
            return InprocFault(PeerUnreachableError("dead"), copied_bytes=dice.randrange(op.num_bytes))
        drawn = dice.random()
        if drawn < data.fail:
            trace("data_failed", direction, op.segment.id)
            return InprocFault(PeerUnreachableError("refused"))
        drawn -= data.fail
        if drawn < data.torn:
            trace("data_torn", direction, op.segment.id)
            return InprocFault(TransferError("broke off"), copied_bytes=dice.randrange(op.num_bytes))
        if direction == "read":
            return None
        drawn -= data.torn
        if drawn < data.late:
            trace("data_late", op.segment.id, op.offset)
            late = b"".join(op.buffers)
            network.loop.call_later(dice.uniform(0.01, 1.5), self._land, op, late)
            return InprocFault(TransferTimeoutError("no answer"))
        drawn -= data.late
        if drawn < data.flip and op.num_bytes > HEADER_BYTES:
            network.loop.call_later(dice.uniform(0, 0.3), self._flip, op)
        return None

    def _land(self, op: TransferOp, what: bytes) -> None:
        memory = self._setup.memory.get(op.segment.id)
        if memory is not None:
            length = self._setup.network.dice.choice([len(what), len(what), len(what) // 2])
            memory[op.offset : op.offset + length] = what[:length]

    def _flip(self, op: TransferOp) -> None:
        memory = self._setup.memory.get(op.segment.id)
        if memory is not None:
            network = self._setup.network
            network.trace("data_flipped", op.segment.id, op.offset)
            memory[op.offset + network.dice.randrange(HEADER_BYTES, op.num_bytes)] ^= 1


async def _until_killed(mover: ChunkMover) -> None:
    try:
        await mover.run()
    finally:
        await mover.aclose()
