"""Whose chunks they are reaches the metadata server with the reservation, whoever reserves, an engine or a tier; and it
stays with the chunk: in its header, in what nodes tell, in tiers and out of them again."""

import asyncio
from collections import Counter

import msgspec
import pytest
from support.sim_loop import run_sim
from support.store_fakes import KEYS, SPEC, key, views
from support.tier_world import DiskLike, TierNode, TierWorld, put_into, shared_tier

from kvcore.chunk_keys import chunk_keys, owner_of, root_key
from kvcore.clock import ManualClock
from kvcore.config.schema import StoreConfig
from kvcore.config.tiers import TiersConfig
from kvcore.eviction.quotas import TenantShares
from kvcore.types import ChunkKey, NodeInfo, OwnerTag, Role
from kvnode.tiers.own_segment import OwnSegment
from kvnode.tiers.peers import PeerDisks
from kvnode.tiers.shape import ChunkShape
from kvstore.manifest import scan
from kvstore.placement import Placement
from kvstore.store import KVStore
from kvstore.tiers.base import ChunkName
from metadata_server.messages import (
    OWNED_LEASES,
    OWNERS,
    FindHoldersReply,
    FindHoldersRequest,
    MatchReply,
    MatchRequest,
    ReserveReply,
    ReserveRequest,
)
from metadata_server.partitions.client import _for_version
from nodeapi.messages import PROMOTE_OWNER, PrefillRequest, PromoteReply, PromoteRequest
from transfer.inproc import InprocTransfer


class Server:
    """A metadata server of some version that has no room."""

    available = True

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol
        self.requests: list[ReserveRequest | MatchRequest] = []

    async def reserve(self, request: ReserveRequest, *, timeout_s: float | None = None) -> ReserveReply:
        self.requests.append(request)
        return ReserveReply(outcomes=[])

    async def match(self, request: MatchRequest, *, timeout_s: float | None = None) -> MatchReply:
        self.requests.append(request)
        return MatchReply(replicas=[])

    wait = match

    async def nodes(self) -> None:
        pass


OWNER, OTHER = owner_of(b"tenant"), owner_of(b"other")


@pytest.mark.parametrize(("protocol", "said"), [(OWNERS, OWNER), (OWNERS - 1, msgspec.UNSET)])
async def test_a_put_says_whose_chunks_it_writes_to_a_server_that_knows_owners(protocol, said):
    server = Server(protocol)
    how = {"metadata": server, "transfer": InprocTransfer({}), "host_id": "h", "clock": ManualClock()}
    store = KVStore(spec=SPEC, node_id="a", incarnation=1, **how)
    async with await store.begin_put(KEYS, prefer_segment=None, timeout_s=5, owner=OWNER):
        pass
    async with await store.begin_put(KEYS, prefer_segment=None, timeout_s=5):
        pass
    assert [request.owner for request in server.requests] == [said, msgspec.UNSET]
    await store.aclose()


@pytest.mark.parametrize(("protocol", "said"), [(OWNED_LEASES, OWNER), (OWNED_LEASES - 1, msgspec.UNSET)])
async def test_a_reader_says_whose_prompt_it_reads_to_a_server_that_counts_by_that(protocol, said):
    server = Server(protocol)
    how = {"metadata": server, "transfer": InprocTransfer({}), "host_id": "h", "clock": ManualClock()}
    store = KVStore(spec=SPEC, node_id="a", incarnation=1, **how)
    for leased in (True, False):
        await store.match(KEYS, timeout_s=5, leased=leased, owner=OWNER)
        await store.wait(KEYS, more_than=0, timeout_s=5, leased=leased, owner=OWNER)
    await store.match(KEYS, timeout_s=5)
    assert [request.owner for request in server.requests] == [*[said] * 4, msgspec.UNSET]
    await store.aclose()


def test_a_partition_is_sent_no_more_than_its_version_knows():
    request = MatchRequest(keys=list(KEYS), owner=OWNER, lease_name=7)
    assert _for_version(request, OWNED_LEASES) is request
    assert _for_version(request, OWNED_LEASES - 1) == MatchRequest(keys=list(KEYS), lease_name=7)


async def test_room_for_what_a_tier_has_is_its_tenants():
    server = Server(OWNERS)
    placement = Placement(server, node_id="a", incarnation=1, clock=ManualClock(), config=StoreConfig())
    segment = OwnSegment(memoryview(bytearray(4096)), "a.1", placement)
    names = [ChunkName(SPEC.fingerprint, key) for key in KEYS]
    await segment.give_back(await segment.reserve(names, 1128, owner=OWNER, timeout_s=5))
    await segment.give_back(await segment.reserve(names, 1128, timeout_s=5))
    assert [request.owner for request in server.requests] == [OWNER, msgspec.UNSET]
    await placement.aclose(1)


def test_what_a_leg_has_promoted_is_its_tenants():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        prompt = list(range(2 * SPEC.chunk_tokens + 1))
        async with world.node("a", [tier]) as a:
            put_into(tier, chunk_keys(root_key(SPEC.fingerprint, b"tenant"), prompt, SPEC.chunk_tokens))
            told, segment = [], a.tiers.promoter.loader._segment
            reserve = segment.reserve

            async def telling(names, num_bytes, **how):
                told.append(how["owner"])
                return await reserve(names, num_bytes, **how)

            segment.reserve = telling
            request = PrefillRequest(request_id="r", prompt_token_ids=prompt, cache_salt=b"tenant", deadline_s=9.0)
            _, given = await a.tiers.before_leg(request)
            assert [one.num_chunks for one in given.promoted] == [2] and told == [owner_of(b"tenant")]

    run_sim(main)


class Nodes:
    """The others' control APIs."""

    def __init__(self) -> None:
        self.asked: list[PromoteRequest] = []

    async def promote(self, url: str, request: PromoteRequest, *, timeout_s: float) -> PromoteReply:
        self.asked.append(request)
        return PromoteReply()


@pytest.mark.parametrize(("protocol", "said"), [(PROMOTE_OWNER, OWNER), (PROMOTE_OWNER - 1, msgspec.UNSET)])
async def test_another_node_is_told_whose_chunks_it_shall_bring_if_it_knows_owners(protocol, said):
    node = NodeInfo(id="b", role=Role.STORE, control_url="http://b", incarnation=1, protocol=protocol)

    class Holders:
        protocol = OWNERS

        async def find_holders(self, request: FindHoldersRequest, *, timeout_s: float) -> FindHoldersReply:
            return FindHoldersReply(nodes=[node], holders=[[0]])

    nodes, name = Nodes(), ChunkName(SPEC.fingerprint, KEYS[0])
    peers = PeerDisks(Holders(), nodes, "a")
    assert await peers.holders([KEYS[0]], timeout_s=5) == [["b"]]
    await peers.promote("b", [name], owner=OWNER, timeout_s=5)
    assert [request.owner for request in nodes.asked] == [said]


def test_what_a_node_brings_for_another_is_the_tenants_that_it_is_told():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        put_into(tier, KEYS)
        async with world.node("a", [tier]) as a:
            told, segment = [], a.tiers.promoter.loader._segment
            reserve = segment.reserve

            async def telling(names, num_bytes, **how):
                told.append(how["owner"])
                return await reserve(names, num_bytes, **how)

            segment.reserve = telling
            for owner, key in zip([OWNER, b"short", msgspec.UNSET], KEYS, strict=True):
                request = PromoteRequest(fingerprint=SPEC.fingerprint, keys=[key], deadline_s=5.0, owner=owner)
                assert (await a.tiers.promote(request)).promoted
            assert told == [OWNER, None, None]

    run_sim(main)


async def test_the_header_of_what_is_put_says_whose_it_is_and_so_does_the_manifest(world):
    segment = world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    for number, owner in ((0, OWNER), (1, None)):
        async with await store.begin_put([KEYS[number]], prefer_segment=None, timeout_s=5, owner=owner) as session:
            assert await session.write(KEYS[number], 4, views(number), timeout_s=5)
            await session.commit(timeout_s=5)
    told = {entry.key: entry.owner for entry in scan(world.memory[segment.id])}
    assert told == {KEYS[0]: OWNER, KEYS[1]: msgspec.UNSET}
    await store.aclose()


def headers(node: TierNode) -> dict[ChunkKey, OwnerTag | None]:
    """What lies in the node's segment, by its headers."""
    return {entry.key: None if entry.owner is msgspec.UNSET else entry.owner for entry in scan(node.view)}


@pytest.mark.parametrize(
    ("saved_by", "asked_by", "then"), [(OWNER, None, OWNER), (None, OWNER, None), (None, None, None)]
)
def test_what_comes_from_a_tier_is_whose_it_was(saved_by, asked_by, then):
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            put_into(tier, KEYS, owner=saved_by)
            assert await a.tiers.promoter.promote(KEYS, ChunkShape.of(SPEC), timeout_s=5, owner=asked_by)
            assert headers(a) == dict.fromkeys(KEYS, then)

    run_sim(main)


def test_a_warm_up_brings_each_tenant_its_own_and_no_more_than_its_share():
    async def main():
        world = TierWorld(metadata=StoreConfig(tenant_share=0.25, high_watermark=1.0))
        disk = DiskLike(world.world.clock)
        mine, theirs, nobodys = ([key(start + number) for number in range(9)] for start in (10, 30, 50))
        for keys, owner in ((mine, OWNER), (theirs, OTHER), (nobodys, None)):
            put_into(disk, keys, owner=owner)
        async with world.node("a", [disk], chunks=16, config=TiersConfig(warm_up=1.0), shares=TenantShares(0.25)) as a:
            await asyncio.sleep(5)
            there = headers(a)
            assert Counter(there.values()) == {OWNER: 4, OTHER: 4, None: 8}
            assert [one for one in mine if one in there] == mine[:4], "the most used ones"
            state = world.world.state
            assert state.counters["evicted"] == 0
            (record,) = state._nodes.segments.values()
            assert record._quotas.used_bytes == {OWNER: 4 * 4096, OTHER: 4 * 4096}

    run_sim(main)


async def test_what_is_public_is_written_as_nobodys_and_read_by_all(world):
    segment = world.add_node("a")
    store, _ = world.store("a", InprocTransfer(world.memory))
    public = frozenset(KEYS[:1])
    async with await store.begin_put(KEYS, prefer_segment=None, timeout_s=5, owner=OWNER, public=public) as session:
        for number, one in enumerate(KEYS):
            assert await session.write(one, 4, views(number), timeout_s=5)
        await session.commit(timeout_s=5)
    told = {entry.key: entry.owner for entry in scan(world.memory[segment.id])}
    assert told == {one: msgspec.UNSET if one in public else OWNER for one in KEYS}
    match = await store.match(KEYS, timeout_s=5)
    buffers = [[memoryview(bytearray(SPEC.chunk_bytes))] for _ in KEYS]
    got = await store.get_into(match, 0, buffers, timeout_s=5, owner=OTHER)
    await store.release(match)
    assert [outcome == "ok" for outcome in got.outcomes] == [one in public for one in KEYS]
    await store.aclose()
