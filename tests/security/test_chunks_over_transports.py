"""Chunks that somebody reads, forges, replays and swaps over each transport: an open cluster's readers take them; where
there is a secret he gets at none over the network, and what he changes in shared memory is a miss."""

import secrets as random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest
from support.chunk_attacks import ATTACKS, cut, whole
from support.store_fakes import CHUNK_BYTES, KEYS, SPEC, World, payload
from support.transfer_rigs import NIXL, UCX
from support.transports import transport_config

from kvcore.chunk_keys import owner_of
from kvcore.errors import TransferError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secrets import Secrets
from kvcore.types import ChunkKey, OwnerTag, ReplicaRef, Segment
from kvstore.integrity.checks import Integrity
from kvstore.types import GetOutcome
from transfer.base import TransferEngine, TransferOp
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import SegmentHosts, build_transfer, start_segment_hosts

SIZE, CALL_S = 1 << 20, 20.0
ID = "a.1"
SECURED = ClusterTrust("here", Secrets((random.token_bytes(32),)))
STRANGERS = [OPEN, ClusterTrust("here", Secrets((random.token_bytes(32),)))]
TENANT, OTHER_TENANT = owner_of(b"tenant"), owner_of(b"other")
MINE, OTHERS = KEYS[0], KEYS[1]
NETWORK = ["tcp", UCX, NIXL]


class Cluster:
    """Node `a` with a chunk of each of two tenants; `segment` is what whoever asks is told of it."""

    def __init__(self, world: World, segment: Segment, memory: SegmentMemory, hosts: SegmentHosts, kind: str) -> None:
        self.world, self.segment, self.memory, self.hosts, self.kind = world, segment, memory, hosts, kind

    async def put(self, key: ChunkKey, owner: OwnerTag) -> ReplicaRef:
        (store,) = self.world.stores
        async with await store.begin_put([key], prefer_segment=None, timeout_s=CALL_S, owner=owner) as session:
            await session.write(key, SPEC.chunk_tokens, [memoryview(payload(key[0]))], timeout_s=CALL_S)
            assert await session.commit(timeout_s=CALL_S) == [key]
        return self.world.replicas(key)[0].ref

    async def get(self, key: ChunkKey) -> tuple[GetOutcome, bytes]:
        (store,) = self.world.stores
        match = await store.match([key], timeout_s=CALL_S)
        into = bytearray(CHUNK_BYTES)
        result = await store.get_into(match, 0, [[memoryview(into)]], timeout_s=CALL_S)
        await store.release(match)
        return result.outcomes[0], bytes(into)

    def there(self, place: ReplicaRef) -> bytes:
        return bytes(self.memory.view[place.offset : place.offset + place.length])


@asynccontextmanager
async def running(kind: str, trust: ClusterTrust) -> AsyncIterator[Cluster]:
    world, config = World(), transport_config(kind)
    integrity = Integrity() if trust.secrets is None else Integrity("mac", trust.secrets)
    with SegmentMemory.create(ID, SIZE) as memory:
        hosts = await start_segment_hosts(config, memory, host="127.0.0.1", trust=trust)
        engine = build_transfer(config, host_identity(), trust=trust)
        try:
            segment = msgspec.structs.replace(
                world.add_node("a", SIZE, kind, host_identity()), addresses={kind: hosts.addresses[kind]}
            )
            world.memory[ID] = memory.view
            world.register(segment)
            world.store("a", engine, integrity=integrity)
            yield Cluster(world, segment, memory, hosts, kind)
        finally:
            await world.aclose()
            world.memory.clear()
            await engine.aclose()
            await hosts.aclose()


class Stranger:
    """Reads and writes a segment by what he was told of it."""

    def __init__(self, engine: TransferEngine, segment: Segment) -> None:
        self._engine, self._segment = engine, segment

    async def read(self, place: ReplicaRef) -> bytes:
        raw = bytearray(place.length)
        (error,) = await self._engine.read([self._op(place.offset, raw)], CALL_S)
        assert error is None or not any(raw)
        if error is not None:
            raise error
        return bytes(raw)

    async def write(self, place: ReplicaRef, chunk: bytes) -> TransferError | None:
        return (await self._engine.write([self._op(place.offset, chunk)], CALL_S))[0]

    def _op(self, offset: int, data: bytes | bytearray) -> TransferOp:
        return TransferOp(self._segment, offset, [memoryview(data)])


@asynccontextmanager
async def stranger(cluster: Cluster, known: ClusterTrust) -> AsyncIterator[Stranger]:
    engine = build_transfer(transport_config(cluster.kind), host_identity(), trust=known)
    try:
        yield Stranger(engine, cluster.segment)
    finally:
        await engine.aclose()


@pytest.mark.parametrize("kind", ["shm", *NETWORK])
async def test_in_an_open_cluster_each_attack_is_one(kind):
    async with running(kind, OPEN) as cluster, stranger(cluster, OPEN) as thief:
        others = await cluster.put(OTHERS, OTHER_TENANT)
        for name, attack in ATTACKS.items():
            mine = await cluster.put(MINE, TENANT)
            stolen = await thief.read(mine)
            assert stolen == cluster.there(mine) and stolen.endswith(payload(MINE[0])), "another tenant's KV"
            assert await thief.write(mine, attack.change(stolen, await thief.read(others))) is None
            outcome, read = await cluster.get(MINE)
            assert outcome is GetOutcome.OK and read != payload(MINE[0]), name
            cluster.world.state._index.remove(cluster.world.replicas(MINE)[0].row)


@pytest.mark.parametrize("kind", NETWORK)
async def test_in_one_with_a_secret_a_stranger_gets_at_no_chunk_over_the_network(kind):
    """Not even one who has them from elsewhere, knows where they lie, and has a secret of his own."""
    async with running(kind, SECURED) as cluster:
        mine, others = await cluster.put(MINE, TENANT), await cluster.put(OTHERS, OTHER_TENANT)
        before = {place.offset: cluster.there(place) for place in (mine, others)}
        for known in STRANGERS:
            async with stranger(cluster, known) as thief:
                for place in (mine, others):
                    with pytest.raises(TransferError):
                        await thief.read(place)
                for attack in ATTACKS.values():
                    assert await thief.write(mine, attack.change(before[mine.offset], before[others.offset]))
        assert before == {place.offset: cluster.there(place) for place in (mine, others)}
        assert set(cluster.hosts.refused) <= {(kind, "proof")}
        for key in (MINE, OTHERS):
            assert await cluster.get(key) == (GetOutcome.OK, payload(key[0]))


async def test_what_a_process_of_the_same_user_changes_in_shared_memory_is_a_miss():
    async with running("shm", SECURED) as cluster, stranger(cluster, OPEN) as thief:
        others = await cluster.put(OTHERS, OTHER_TENANT)
        for name, attack in ATTACKS.items():
            mine = await cluster.put(MINE, TENANT)
            assert await thief.write(mine, attack.change(await thief.read(mine), await thief.read(others))) is None
            assert (await cluster.get(MINE))[0] is attack.outcome, name
            for found in cluster.world.replicas(MINE):
                cluster.world.state._index.remove(found.row)
        assert await cluster.get(OTHERS) == (GetOutcome.OK, payload(OTHERS[0]))


@pytest.mark.parametrize("kind", ["shm", *NETWORK])
async def test_an_old_chunk_put_back_by_who_has_the_secret_has_the_bytes_of_its_key(kind):
    """What a node that was taken over can replay is stale; made to look like today's it has the right bytes."""
    async with running(kind, SECURED) as cluster, stranger(cluster, SECURED) as insider:
        old = await insider.read(await cluster.put(MINE, TENANT))
        cluster.world.state._index.remove(cluster.world.replicas(MINE)[0].row)
        now = await cluster.put(MINE, TENANT)
        assert await insider.write(now, old) is None
        assert (await cluster.get(MINE))[0] is GetOutcome.STALE
        now = await cluster.put(MINE, TENANT)
        header, body = cut(old)
        assert await insider.write(now, whole(replace(header, generation=now.generation), body)) is None
        assert await cluster.get(MINE) == (GetOutcome.OK, payload(MINE[0]))
