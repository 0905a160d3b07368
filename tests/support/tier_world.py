"""Nodes with tiers over a metadata server's core, in one process: what tests of filling and promoting run on."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from support.metadata_rigs import DirectEventSource
from support.sim_loop import LoopClock
from support.store_fakes import CHUNK_BYTES, SPEC, Wire, World, payload

from kvcore.clock import Clock
from kvcore.config.schema import StoreConfig
from kvcore.config.tiers import RedisTierConfig, TierConfig, TiersConfig
from kvcore.eviction.quotas import TenantShares
from kvcore.types import ChunkKey, NodeInfo, OwnerTag, Role
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.node_tiers import NodeTiers, OpenTier, open_node_tiers
from kvnode.tiers.own_segment import OwnSegment
from kvnode.tiers.promoter import Peers
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack
from kvstore.placement import Placement
from kvstore.store import KVStore
from kvstore.tiers.base import ChunkName, Tier, TierChunk, TierOutcome
from kvstore.tiers.memory import MemoryTier
from kvstore.types import run_inline
from metadata_server.client import MetadataClient
from metadata_server.subscription import IndexSubscription
from transfer.inproc import InprocTransfer

CALL_S = 5.0


@dataclass
class TierNode:
    """A node of a TierWorld. `store` writes and reads in its name; `wire` is the tiers' way to the metadata server."""

    name: str
    tiers: NodeTiers
    store: KVStore
    wire: Wire
    view: memoryview
    subscription: IndexSubscription

    async def put(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """As its engine does, into its own segment if there is room."""
        async with await self.store.begin_put(keys, prefer_segment=f"{self.name}.1", timeout_s=CALL_S) as session:
            for key in keys:
                await session.write(key, SPEC.chunk_tokens, [memoryview(payload(key[0]))], timeout_s=CALL_S)
            return await session.commit(timeout_s=CALL_S)

    async def settled(self) -> None:
        """Until all that was told is in the tiers."""
        await asyncio.sleep(0.1)
        async with asyncio.timeout(60):
            while not self.tiers.filler.idle:  # noqa: ASYNC110  (virtual time)
                await asyncio.sleep(0.1)

    async def cached(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading chunks are there for a reader, every byte as it was put."""
        match = await self.store.match(keys, timeout_s=CALL_S)
        buffers = [[memoryview(bytearray(CHUNK_BYTES))] for _ in range(match.num_chunks)]
        result = await self.store.get_into(match, 0, buffers, timeout_s=CALL_S)
        await self.store.release(match)
        assert all(outcome == "ok" for outcome in result.outcomes), result
        assert [bytes(one[0]) for one in buffers] == [payload(key[0]) for key in keys[: match.num_chunks]]
        return match.num_chunks


class TierWorld:
    """A metadata server and a transport that reaches every segment. To be used on a simulated loop."""

    def __init__(self, config: StoreConfig | None = None, *, metadata: StoreConfig | None = None) -> None:
        self.world = World()
        self.world.use(LoopClock(asyncio.get_running_loop()), metadata)
        self.config = config or StoreConfig(retire_grace_s=0.0)

    @asynccontextmanager
    async def node(
        self,
        name: str,
        tiers: Sequence[Tier | tuple[Tier, TierConfig]],
        *,
        chunks: int = 64,
        peers: Callable[[MetadataClient], Peers] | None = None,
        config: TiersConfig | None = None,
        shares: TenantShares | None = None,
        limits: MoveLimits = MoveLimits(),
    ) -> AsyncIterator[TierNode]:
        """With room for about `chunks` chunks."""
        world, clock = self.world, self.world.clock
        segment = world.add_node(name, chunks * 4096)
        view, wire = world.memory[segment.id], Wire(world.dispatch)
        client = MetadataClient(wire, clock, CALL_S)
        await client.nodes()
        opened = [one if isinstance(one, tuple) else (one, RedisTierConfig(url="redis://memory")) for one in tiers]
        async with AsyncExitStack() as stack:
            placement = Placement(client, node_id=name, incarnation=1, clock=clock, config=self.config)
            info = NodeInfo(id=name, role=Role.STORE, control_url=f"http://{name}", incarnation=1)
            made = await stack.enter_async_context(
                open_node_tiers(
                    [OpenTier(tier, section) for tier, section in opened],
                    config or TiersConfig(),
                    shares=shares,
                    node=info,
                    segment=OwnSegment(view, segment.id, placement),
                    placement=placement,
                    metadata=client,
                    clock=clock,
                    run_blocking=run_inline,
                    peers=peers(client) if peers is not None else None,
                    limits=limits,
                )
            )
            subscription = IndexSubscription(DirectEventSource(world.core), made.filler, clock)
            following = asyncio.create_task(subscription.run())
            stack.push_async_callback(_ended, following)
            transfer = InprocTransfer(world.memory)
            store, _ = world.store(name, transfer, self.config)
            stack.push_async_callback(store.aclose)
            made.engine_ready(SPEC)
            yield TierNode(name, made, store, wire, view, subscription)

    def forget(self, keys: Sequence[ChunkKey]) -> None:
        """Evict these from every segment."""
        for key in keys:
            for replica in list(self.world.replicas(key)):
                self.world.state._index.remove(replica.row)
        self.world.state._index.publish()
        self.world.core._after_change()


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def shared_tier(clock: Clock, before: Callable[[float], Awaitable[bool]] | None = None) -> MemoryTier:
    return MemoryTier(1 << 24, clock, before=before)


def put_into(
    tier: MemoryTier, keys: Sequence[ChunkKey], damaged: Sequence[ChunkKey] = (), *, owner: OwnerTag | None = None
) -> None:
    """As another cluster's filler left them."""
    for key in keys:
        body = payload(key[0])
        proof = checksum([memoryview(body)])
        header = ChunkHeader(key, SPEC.fingerprint, SPEC.chunk_tokens, CHUNK_BYTES, proof, 7, owner)
        value = bytearray(pack(header) + body)
        if key in damaged:
            value[HEADER_BYTES + 5] ^= 1
        tier.chunks[ChunkName(SPEC.fingerprint, key)] = (bytes(value), None)
        tier._used += len(value)


class DiskLike(MemoryTier):
    """A tier of one node's own."""

    shared = False

    def __init__(self, clock: Clock) -> None:
        super().__init__(1 << 24, clock, name="disk")
        self.on_change: Callable[[Sequence[ChunkName], Sequence[ChunkName]], None] = lambda _came, _left: None

    def names(self) -> list[ChunkName]:
        return list(self.chunks)

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        before = set(self.chunks)
        outcomes = await super().save(chunks, ttl_s=ttl_s, timeout_s=timeout_s)
        self.on_change([name for name in self.chunks if name not in before], [])
        return outcomes
