"""Chunks changed behind everybody's back: in a segment and in each kind of tier. A checksum takes them; no MAC does,
nor does a reader of encrypted ones."""

from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256

import pytest
from support.chunk_attacks import ATTACKS, CLUSTER, cut, sealed_chunk, whole
from support.store_fakes import CHUNK_BYTES, KEYS, SPEC, Wire, World, payload
from support.tier_rigs import KINDS

from kvcore.chunk_keys import owner_of
from kvcore.clock import SystemClock
from kvcore.config.schema import StoreConfig
from kvcore.types import ChunkKey, OwnerTag, ReplicaRef, Segment
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.loader import LoadPlan, TierLoader
from kvnode.tiers.own_segment import OwnSegment
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader
from kvstore.integrity.checks import Integrity
from kvstore.placement import Placement
from kvstore.tiers.base import ChunkName, Tier, TierChunk, TierOutcome
from kvstore.tiers.guarded import GuardedTier
from kvstore.types import GetOutcome, run_inline
from metadata_server.client import MetadataClient
from transfer.base import TransferOp
from transfer.inproc import InprocTransfer

MACS = Integrity("mac", CLUSTER)
ENCRYPTED = Integrity("mac", CLUSTER, encrypt=True)
TENANT, OTHER_TENANT = owner_of(b"tenant"), owner_of(b"other")
MINE, OTHERS = KEYS[0], KEYS[1]
CALL_S = 5.0


class Cluster:
    """Node `a` holds a chunk of each of two tenants; an attacker reaches its segment by one-sided transfers."""

    def __init__(self, integrity: Integrity) -> None:
        self.integrity, self.world = integrity, World()
        self.segment: Segment = self.world.add_node("a")
        self.store, _ = self.world.store("a", InprocTransfer(self.world.memory), integrity=integrity)
        self._attacker = InprocTransfer(self.world.memory)

    async def put(self, key: ChunkKey, owner: OwnerTag = TENANT) -> ReplicaRef:
        async with await self.store.begin_put([key], prefer_segment=None, timeout_s=CALL_S, owner=owner) as session:
            await session.write(key, SPEC.chunk_tokens, [memoryview(payload(key[0]))], timeout_s=CALL_S)
            assert await session.commit(timeout_s=CALL_S) == [key]
        return self.world.replicas(key)[0].ref

    async def get(self, key: ChunkKey, owner: OwnerTag | None = None) -> tuple[GetOutcome, bytes]:
        match = await self.store.match([key], timeout_s=CALL_S)
        into = bytearray(CHUNK_BYTES)
        result = await self.store.get_into(match, 0, [[memoryview(into)]], timeout_s=CALL_S, owner=owner)
        await self.store.release(match)
        return result.outcomes[0], bytes(into)

    def forget(self, key: ChunkKey) -> None:
        """It is evicted."""
        for replica in list(self.world.replicas(key)):
            self.world.state._index.remove(replica.row)

    async def steal(self, place: ReplicaRef) -> bytes:
        raw = bytearray(place.length)
        assert await self._attacker.read([TransferOp(self.segment, place.offset, [memoryview(raw)])], CALL_S) == [None]
        return bytes(raw)

    async def overwrite(self, place: ReplicaRef, chunk: bytes) -> None:
        op = TransferOp(self.segment, place.offset, [memoryview(chunk)])
        assert await self._attacker.write([op], CALL_S) == [None]


@pytest.fixture(params=[Integrity(), MACS, ENCRYPTED], ids=["checksum", "mac", "encrypted"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    made = Cluster(request.param)
    yield made
    await made.world.aclose()


only_macs = pytest.mark.parametrize("cluster", [MACS, ENCRYPTED], ids=["mac", "encrypted"], indirect=True)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
async def test_a_chunk_in_a_segment(cluster, attack):
    mine, others = await cluster.put(MINE), await cluster.put(OTHERS, OTHER_TENANT)
    await cluster.overwrite(mine, attack.change(await cluster.steal(mine), await cluster.steal(others)))
    outcome, read = await cluster.get(MINE)
    if cluster.integrity.verify == "checksum":
        assert outcome is GetOutcome.OK and read != payload(MINE[0]), "the attack is one"
        return
    assert outcome is attack.outcome
    assert cluster.store.counters()[f"miss_{outcome}"] == 1
    await cluster.store.aclose()
    assert [(item.replica, item.reason) for item in cluster.world.quarantined] == [(mine, outcome)]
    assert cluster.world.replicas(MINE) == [] and (await cluster.get(OTHERS))[0] is GetOutcome.OK


@only_macs
async def test_what_was_refused_is_computed_and_read_again(cluster):
    await cluster.overwrite(mine := await cluster.put(MINE), ATTACKS["forge"].change(await cluster.steal(mine), b""))
    assert (await cluster.get(MINE))[0] is GetOutcome.FORGED
    await cluster.put(MINE)
    assert await cluster.get(MINE) == (GetOutcome.OK, payload(MINE[0]))


@only_macs
async def test_who_forges_is_in_the_log_and_cannot_fill_it(cluster, caplog):
    for _ in range(5):
        place = await cluster.put(MINE)
        await cluster.overwrite(place, ATTACKS["forge"].change(await cluster.steal(place), b""))
        assert (await cluster.get(MINE))[0] is GetOutcome.FORGED
    said = [record.getMessage() for record in caplog.records if "chunk_forged" in record.getMessage()]
    assert len(said) == 1 and MINE.hex() in said[0] and "peer=a.1" in said[0]
    assert cluster.store.counters()["replica_forged"] == 5


@only_macs
async def test_an_old_copy_of_the_same_chunk_is_stale_or_has_the_right_bytes(cluster):
    """Its key says which tokens, weights and tenant it is of, so an old one is as good as the new one."""
    old = await cluster.steal(await cluster.put(MINE))
    cluster.forget(MINE)
    now = await cluster.put(MINE)
    await cluster.overwrite(now, old)
    assert (await cluster.get(MINE))[0] is GetOutcome.STALE
    now = await cluster.put(MINE)
    header, body = cut(old)
    await cluster.overwrite(now, whole(replace(header, generation=now.generation), body))
    assert await cluster.get(MINE) == (GetOutcome.OK, payload(MINE[0]))


async def test_a_reader_that_knows_its_tenant_takes_no_others_chunk(cluster):
    await cluster.put(MINE, OTHER_TENANT)
    assert (await cluster.get(MINE, TENANT))[0] is GetOutcome.FOREIGN
    await cluster.put(MINE, TENANT)
    assert (await cluster.get(MINE, TENANT))[0] is GetOutcome.OK


# --- tiers ---


class Promoter:
    """A node that brings chunks from a tier into its segment."""

    def __init__(self, tier: Tier, integrity: Integrity) -> None:
        self.world = World()
        segment = self.world.add_node("a")
        self.client = MetadataClient(Wire(self.world.dispatch), self.world.clock, CALL_S)
        self.placement = Placement(
            self.client,
            node_id="a",
            incarnation=1,
            clock=self.world.clock,
            config=StoreConfig(),
        )
        own = OwnSegment(self.world.memory[segment.id], segment.id, self.placement, integrity)
        self._guard = GuardedTier(tier, SystemClock(), in_flight_bytes=1 << 20)
        self._loader = TierLoader(own, {tier.name: CALL_S}, SystemClock(), run_blocking=run_inline, limits=MoveLimits())
        self.store, _ = self.world.store("a", InprocTransfer(self.world.memory), integrity=integrity)

    async def promote(self, name: ChunkName) -> dict[str, int]:
        """What it counts."""
        await self.client.nodes()
        plan = LoadPlan([name], [[self._guard]])
        await self._loader.load(plan, HEADER_BYTES + CHUNK_BYTES, SystemClock().now() + CALL_S)
        return {what: count for (_, what), count in self._loader.counts.items() if count}

    async def read(self, name: ChunkName) -> tuple[GetOutcome, bytes]:
        match = await self.store.match([name.key], timeout_s=CALL_S)
        into = bytearray(CHUNK_BYTES)
        result = await self.store.get_into(match, 0, [[memoryview(into)]], timeout_s=CALL_S)
        await self.store.release(match)
        return result.outcomes[0], bytes(into)

    async def aclose(self) -> None:
        await self.placement.aclose(1.0)
        await self.world.aclose()


def written(key: ChunkKey, owner: OwnerTag, integrity: Integrity) -> bytes:
    """As a node leaves it in a tier."""
    body = payload(key[0])
    header = ChunkHeader(key, SPEC.fingerprint, SPEC.chunk_tokens, CHUNK_BYTES, 0, 9, owner)
    return sealed_chunk(integrity, header, body)


QUICK, SLOW = ("memory", "disk", "folder"), ("lossless_disk", "redis", "redis_cluster", "mooncake", "s3")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> ChunkName:
    """Another one in each test: a server that they share keeps what it was given for a while."""
    return ChunkName(SPEC.fingerprint, ChunkKey(MINE[:1] + sha256(request.node.name.encode()).digest()[:15]))


@pytest.fixture(
    params=[
        *QUICK,
        *(pytest.param(kind, marks=[*KINDS[kind].marks, pytest.mark.slow]) for kind in SLOW),
    ]
)
async def tier(request: pytest.FixtureRequest) -> AsyncIterator[Tier]:
    async with KINDS[request.param].open() as rig:
        yield rig.tier


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("integrity", [Integrity(), MACS, ENCRYPTED], ids=["checksum", "mac", "encrypted"])
async def test_a_chunk_in_a_tier(tier, name, attack, integrity):
    value = attack.change(written(name.key, TENANT, integrity), written(OTHERS, OTHER_TENANT, integrity))
    assert await tier.save([TierChunk(name, [memoryview(value)])], timeout_s=CALL_S) == [TierOutcome.OK]
    node = Promoter(tier, integrity)
    counts = await node.promote(name)
    if integrity.verify == "checksum":
        outcome, read = await node.read(name)
        assert counts == {"promoted": 1}
        assert outcome is GetOutcome.OK and read != payload(MINE[0]), "the attack is one"
    else:
        assert counts == {attack.outcome: 1} and node.world.replicas(name.key) == []
        assert await tier.find([name], timeout_s=CALL_S) == [False], "nobody else has to look at it"
    await node.aclose()


@pytest.mark.parametrize("integrity", [MACS, ENCRYPTED], ids=["mac", "encrypted"])
async def test_a_chunk_that_comes_from_a_tier_unchanged_is_proved_to_its_reader_too(tier, name, integrity):
    chunk = TierChunk(name, [memoryview(written(name.key, TENANT, integrity))])
    assert await tier.save([chunk], timeout_s=CALL_S) == [TierOutcome.OK]
    node = Promoter(tier, integrity)
    assert await node.promote(name) == {"promoted": 1}
    assert await node.read(name) == (GetOutcome.OK, payload(MINE[0]))
    await node.aclose()
