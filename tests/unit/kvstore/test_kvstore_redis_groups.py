"""Redis Sentinel and Redis Cluster as tiers, on real servers: failovers, nodes that are away, slots that move."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from redis.crc import key_slot
from support.ports import free_ports
from support.redis_groups import ClusterGroup, SentinelGroup, cluster_group, info, sentinel_group, until
from support.redis_server import redis_server, with_redis
from support.tier_rigs import chunk_of, content, name_of, room_for

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError
from kvstore.tiers.base import ChunkName, TierChunk, TierOutcome
from kvstore.tiers.guarded import GuardedTier
from kvstore.tiers.limits import RedisLimits
from kvstore.tiers.places.cluster import redis_tier
from kvstore.tiers.places.opening import open_redis
from kvstore.tiers.places.redis_url import RespServer, parse_server
from kvstore.tiers.redis_parts import part_key

OK, MISSING, AWAY = TierOutcome.OK, TierOutcome.MISSING, TierOutcome.UNAVAILABLE
CALL_S = 20.0
SHORT_S = 1.0
RETURN_S = 30.0
PART = 100_000
LIMITS = RedisLimits(part_bytes=PART, group_bytes=1 << 20)


@asynccontextmanager
async def tier_at(url: str) -> AsyncIterator[GuardedTier]:
    """As a node has it, with its breaker."""
    tier = open_redis(url, 2, SystemClock(), LIMITS)
    guard = GuardedTier(tier, SystemClock(), in_flight_bytes=64 << 20)
    try:
        yield guard
    finally:
        await guard.aclose()


async def save(tier: GuardedTier, *chunks: TierChunk, timeout_s: float = CALL_S) -> list[TierOutcome]:
    return await tier.save(chunks, timeout_s=timeout_s)


async def load(tier: GuardedTier, *chunks: TierChunk, timeout_s: float = CALL_S) -> list[TierOutcome]:
    """OK only if every byte is as it was saved."""
    backs = [room_for(chunk) for chunk in chunks]
    outcomes = await tier.load(backs, timeout_s=timeout_s)
    for chunk, back, outcome in zip(chunks, backs, outcomes, strict=True):
        assert outcome is not OK or content(back) == content(chunk)
    return outcomes


async def within(seconds: float, check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(seconds):
        while not await check():  # noqa: ASYNC110  (servers tell nobody)
            await asyncio.sleep(0.05)


# --- sentinels ---


@pytest.fixture(scope="module")
def sentinels() -> Iterator[SentinelGroup]:
    with sentinel_group() as group:
        yield group


class Moving:
    """A `ServerPlace` that is found elsewhere once it was forgotten."""

    shown = "the one and the other"

    def __init__(self, *urls: str) -> None:
        self._servers = [parse_server(url) for url in urls]

    async def find(self, timeout_s: float) -> RespServer:
        return self._servers[0]

    def forget(self) -> None:
        del self._servers[:-1]


@with_redis
async def test_a_master_that_is_made_a_replica_while_it_answers_is_left():
    with redis_server("--replicaof", "127.0.0.1", "1") as demoted, redis_server() as master:
        tier = redis_tier(Moving(demoted.url, master.url), 2, SystemClock(), LIMITS)
        chunk = chunk_of(name_of(1), PART)
        assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [MISSING], "a replica is read"
        assert await tier.save([chunk], timeout_s=CALL_S) == [AWAY]
        assert await tier.save([chunk], timeout_s=CALL_S) == [OK] and master.ask(b"DBSIZE") == 2
        assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [OK] and tier.stats().problem is None
        assert demoted.ask(b"INFO", b"clients").count(b"connected_clients:1\r"), "of it no connection is kept"
        await tier.aclose()


@with_redis
async def test_sentinels_that_are_away_or_know_no_such_service_are_named(sentinels: SentinelGroup):
    (port,) = free_ports(1)
    for url, words in (
        (f"redis-sentinel://127.0.0.1:{port}/kv", "no sentinel knows a master of kv"),
        (sentinels.url.replace("/kv", "/other"), "no sentinel knows a master of other"),
    ):
        async with tier_at(url) as tier:
            assert await load(tier, chunk_of(name_of(1), 10)) == [AWAY]
            assert words in (tier.stats().problem or "")
    async with tier_at(sentinels.url.replace("://", f"://127.0.0.1:{port},")) as tier:
        assert await save(tier, chunk_of(name_of(2), PART)) == [OK], "the others answer for one that is away"


@with_redis
async def test_after_a_failover_the_new_master_is_used_and_has_what_was_saved(sentinels: SentinelGroup):
    """Last of those on these sentinels: one of the servers is gone afterwards."""
    chunks = [chunk_of(name_of(number), 3 * PART) for number in range(3)]
    async with tier_at(sentinels.url) as tier:
        assert await save(tier, *chunks) == [OK] * 3
        old = sentinels.master
        (new,) = (server for server in sentinels.servers if server is not old)
        until(lambda: new.ask(b"DBSIZE") == old.ask(b"DBSIZE"), "the replica has all")
        old.stop()
        assert set(await load(tier, *chunks, timeout_s=SHORT_S)) <= {AWAY, OK}

        async def promoted() -> bool:
            assert set(await load(tier, *chunks, timeout_s=SHORT_S)) <= {AWAY, OK}
            return b"role:master" in info(new, b"replication")

        await within(30, promoted)
        extra = chunk_of(name_of(100), PART)

        async def used() -> bool:
            return await load(tier, *chunks, timeout_s=SHORT_S) == [OK] * 3 and await save(tier, extra) == [OK]

        await within(RETURN_S, used)
        assert tier.stats().problem is None


# --- a cluster ---


@pytest.fixture(scope="module")
def started_nodes() -> Iterator[ClusterGroup]:
    with cluster_group(replicas=1) as group:
        yield group


@pytest.fixture
def nodes(started_nodes: ClusterGroup) -> ClusterGroup:
    """The fourth follows the first."""
    started_nodes.settle()
    return started_nodes


def names_on(nodes: ClusterGroup, number: int, count: int, start: int = 0) -> list[ChunkName]:
    """Chunks whose slots that master was given."""
    names = (name_of(one) for one in range(start, start + 10_000))
    own = (name for name in names if nodes.server_of(part_key(name, 0)) is nodes.servers[number])
    return [name for name, _ in zip(own, range(count), strict=False)]


@with_redis
async def test_chunks_lie_where_their_slots_are_each_whole_on_one_node(nodes: ClusterGroup):
    chunks = [chunk_of(name, 3 * PART) for number in range(3) for name in names_on(nodes, number, 4)]
    async with tier_at(nodes.url) as tier:
        assert await save(tier, *chunks) == [OK] * 12 == await load(tier, *chunks)
        assert tier.stats().problem is None
    for number in range(3):
        assert nodes.servers[number].ask(b"DBSIZE") == 4 * 4
    async with tier_at(nodes.url.rpartition(",")[0]) as tier:
        assert await load(tier, *chunks) == [OK] * 12, "from some of its nodes it learns of all"


@with_redis
async def test_a_node_that_is_away_is_a_miss_for_its_chunks_alone_and_used_again(nodes: ClusterGroup):
    ours = [chunk_of(name, PART) for name in names_on(nodes, 0, 2, start=10_000)]
    theirs = [chunk_of(name, PART) for name in names_on(nodes, 2, 2, start=10_000)]
    async with tier_at(nodes.url) as tier:
        assert await save(tier, *ours, *theirs) == [OK] * 4
        nodes.servers[2].stop()
        for _ in range(10):
            assert await load(tier, *ours, *theirs) == [OK, OK, AWAY, AWAY]
            assert await tier.find([theirs[0].name], timeout_s=CALL_S) == [False]
        assert not tier.away and str(nodes.servers[2].port) in (tier.stats().problem or "")
        nodes.settle()

        async def used() -> bool:
            return await save(tier, *theirs, timeout_s=SHORT_S) == [OK, OK]

        await within(RETURN_S, used)
        assert await load(tier, *ours, *theirs) == [OK] * 4 and tier.stats().problem is None


@with_redis
async def test_a_node_that_stands_still_costs_its_deadline_a_few_times_and_then_nothing(nodes: ClusterGroup):
    ours = [chunk_of(name, PART) for name in names_on(nodes, 0, 2, start=10_000)]
    theirs = [chunk_of(name, PART) for name in names_on(nodes, 2, 2, start=10_000)]
    async with tier_at(nodes.url) as tier:
        assert await save(tier, *ours, *theirs) == [OK] * 4
        nodes.servers[2].freeze()
        try:
            for _ in range(3):
                assert await load(tier, *ours, *theirs, timeout_s=SHORT_S) == [OK, OK, AWAY, AWAY]
            began = time.monotonic()
            assert await load(tier, *ours, *theirs, timeout_s=3 * CALL_S) == [OK, OK, AWAY, AWAY]
            assert time.monotonic() - began < CALL_S
        finally:
            nodes.servers[2].thaw()
        nodes.settle()


@with_redis
async def test_what_moves_to_another_node_is_followed_while_it_moves_and_afterwards(nodes: ClusterGroup):
    (name,) = names_on(nodes, 0, 1, start=50_000)
    chunk, (old, new) = chunk_of(name, 3 * PART), nodes.servers[:2]
    slot = b"%d" % key_slot(part_key(name, 0))
    async with tier_at(nodes.url) as tier:
        assert await load(tier, chunk) == [MISSING]
        assert new.ask(b"CLUSTER", b"SETSLOT", slot, b"IMPORTING", nodes.id_of(0)) == b"OK"
        assert old.ask(b"CLUSTER", b"SETSLOT", slot, b"MIGRATING", nodes.id_of(1)) == b"OK"
        assert await save(tier, chunk) == [OK] and old.ask(b"CLUSTER", b"COUNTKEYSINSLOT", slot) == 0
        assert new.ask(b"CLUSTER", b"COUNTKEYSINSLOT", slot) == 4, "ASK is followed"
        assert await tier.find([name], timeout_s=CALL_S) == [True] and await load(tier, chunk) == [OK]
        for node in (new, old, nodes.servers[2]):
            assert node.ask(b"CLUSTER", b"SETSLOT", slot, b"NODE", nodes.id_of(1)) == b"OK"
        assert await load(tier, chunk) == [OK] and await tier.find([name], timeout_s=CALL_S) == [True]
        assert await tier.expire([name], 900.0, timeout_s=CALL_S) == 1
        await tier.remove([name], timeout_s=CALL_S)
        assert new.ask(b"CLUSTER", b"COUNTKEYSINSLOT", slot) == 0, "MOVED is followed"
        assert tier.stats().problem is None


@with_redis
async def test_of_a_chunk_that_is_halfway_no_wrong_byte_comes(nodes: ClusterGroup):
    (name,) = names_on(nodes, 0, 1, start=60_000)
    chunk, (old, new) = chunk_of(name, 3 * PART), nodes.servers[:2]
    slot = b"%d" % key_slot(part_key(name, 0))
    async with tier_at(nodes.url) as tier:
        assert await save(tier, chunk) == [OK]
        new.ask(b"CLUSTER", b"SETSLOT", slot, b"IMPORTING", nodes.id_of(0))
        old.ask(b"CLUSTER", b"SETSLOT", slot, b"MIGRATING", nodes.id_of(1))
        for part in range(4):
            moved = old.ask(b"MIGRATE", b"127.0.0.1", b"%d" % new.port, part_key(name, part), b"0", b"5000")
            assert moved == b"OK"
            assert (await load(tier, chunk))[0] in ((MISSING, AWAY) if part < 3 else (OK,))
        for node in (new, old, nodes.servers[2]):
            node.ask(b"CLUSTER", b"SETSLOT", slot, b"NODE", nodes.id_of(1))
        assert await load(tier, chunk) == [OK]


@with_redis
async def test_after_a_failover_of_one_master_its_replica_is_used(nodes: ClusterGroup):
    """Last of those on these nodes: the first master is a replica afterwards."""
    chunks = [chunk_of(name, PART) for name in names_on(nodes, 0, 2, start=70_000)]
    first, replica = nodes.servers[0], nodes.servers[3]
    async with tier_at(nodes.url) as tier:
        assert await save(tier, *chunks) == [OK, OK]
        until(lambda: replica.ask(b"DBSIZE") == first.ask(b"DBSIZE"), "the replica has all")
        first.stop()
        until(lambda: b"role:master" in info(replica, b"replication"), "the replica is promoted")

        async def used() -> bool:
            return await load(tier, *chunks, timeout_s=SHORT_S) == [OK, OK]

        await within(RETURN_S, used)
        more = [chunk_of(name, PART) for name in names_on(nodes, 0, 4, start=80_000)]
        assert await save(tier, *more) == [OK] * 4


async def test_a_cluster_of_which_no_node_answers_is_away_and_says_so():
    (port,) = free_ports(1)
    async with tier_at(f"redis-cluster://127.0.0.1:{port}") as tier:
        chunk = chunk_of(name_of(1), 10)
        assert await load(tier, chunk) == [AWAY] and await save(tier, chunk) == [AWAY]
        assert await tier.find([chunk.name], timeout_s=CALL_S) == [False]
        assert "none of its nodes says who has which slot" in (tier.stats().problem or "") and tier.away


@pytest.mark.parametrize("url", ["redis-sentinel://h/main", "redis-cluster://h"])
def test_without_the_library_that_finds_them_it_is_named(url, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[redis\]'"):
        open_redis(url, 2, SystemClock())
    open_redis("redis://h", 2, SystemClock())
