"""One client of several partitions: what happens to the others when one is away, and to what nobody takes."""

import asyncio
from dataclasses import replace

import msgspec
import pytest
from support.metadata_rigs import DirectEventSource, DirectTransport, end, until
from support.metadata_words import UNIT, granted, ids, key, keys, new_state, registration, reservation
from support.partition_rigs import PartitionRig

from kvcore.clock import ManualClock, SystemClock
from kvcore.config.partitions import PartitionConfig
from kvcore.config.schema import MetadataServerConfig
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.partitions import Part, Partitions
from kvcore.types import ChunkKey
from metadata_server.account_messages import Orphan, OrphansOfKind, OrphansReply, RemoveOrphansReply
from metadata_server.cache_messages import (
    MoveChunksRequest,
    NodeOrderRequest,
    RebalanceRequest,
    ReleaseRequest,
    RenewRequest,
)
from metadata_server.client import MetadataClient
from metadata_server.connect import connect_client, connect_subscription, endpoints_of
from metadata_server.core import MetadataCore
from metadata_server.endpoints import ENDPOINTS
from metadata_server.messages import (
    CommitRefusal,
    HeartbeatRequest,
    MatchRequest,
    ReserveStatus,
    TellHoldingsRequest,
    WaitRequest,
)
from metadata_server.partitions.client import PartitionedMetadataClient
from metadata_server.partitions.merging import merge_orphans, merge_removed
from metadata_server.partitions.rules import OF_ONE_NODE, RULES
from metadata_server.partitions.splitting import Piece
from metadata_server.subscription import IndexSubscription
from metadata_server.versions import SPOKEN

A, B = range(2)


@pytest.fixture
async def rig():
    rig = PartitionRig(("a", "b"))
    await rig.register("n", 64)
    yield rig
    for way in rig.ways:
        way.away = way.deaf = False
    await rig.client.aclose()
    rig.check()


def of(rig: PartitionRig, part: int, count: int) -> list[int]:
    """Numbers whose keys belong to it."""
    return [number for number in range(1000) if rig.number(key(number)) == part][:count]


async def put(rig: PartitionRig, numbers: list[int]) -> None:
    replicas = granted(await rig.client.reserve(reservation("n", numbers)))
    assert (await rig.client.commit(ids("n", replicas))).committed == [True] * len(numbers)


def leased(numbers: list[int], name: int = 7) -> MatchRequest:
    return MatchRequest(keys=keys(*numbers), lease_s=60.0, node_id="n", incarnation=1, lease_name=name)


def leases(rig: PartitionRig) -> list[int]:
    return [core.state.num_read_leases for core in rig.cores]


def test_every_call_has_a_rule():
    assert {endpoint.path for endpoint in ENDPOINTS} == RULES.keys() | OF_ONE_NODE


async def test_a_partition_that_is_away_is_a_miss_for_its_keys_alone(rig):
    (a0, a1), (b0, b1) = of(rig, A, 2), of(rig, B, 2)
    await put(rig, [a0, b0])
    rig.ways[B].away = True
    reply = await rig.client.match(leased([a0, b0]))
    assert [refs[0].key for refs in reply.replicas] == [key(a0)] and reply.rebuilding, "more may be there"
    assert (await rig.client.stats()).rebuilding == 1
    outcomes = (await rig.client.reserve(reservation("n", [b1, a1]))).outcomes
    assert [outcome.status for outcome in outcomes] == [ReserveStatus.UNKNOWN, ReserveStatus.GRANTED]
    assert rig.client.available and [part.available for part in rig.client.parts] == [True, False]
    rig.ways[A].away = True
    with pytest.raises(MetadataUnavailableError, match="away"):
        await rig.client.match(leased([a0, b0]))
    rig.ways[A].away = rig.ways[B].away = False
    rig.clock.advance(2.0)  # the breakers' pauses
    await rig.client.release(ReleaseRequest(lease_ids=[reply.lease_id], lease_names=[7]))
    assert leases(rig) == [0, 0]


async def test_what_one_partition_does_not_commit_the_other_does(rig):
    (a0,), (b0,) = of(rig, A, 1), of(rig, B, 1)
    replicas = granted(await rig.client.reserve(reservation("n", [b0, a0])))
    rig.ways[B].away = True
    reply = await rig.client.commit(ids("n", replicas))
    assert (reply.committed, reply.refusals) == ([False, True], [CommitRefusal.UNKNOWN, CommitRefusal.NONE])
    with pytest.raises(MetadataUnavailableError):  # who aborts asks again: what is there for nothing is given back
        await rig.client.abort(ids("n", replicas))
    rig.ways[B].away = False
    rig.clock.advance(2.0)
    await rig.client.abort(ids("n", replicas))
    assert [core.state.num_reservations for core in rig.cores] == [0, 0]
    assert len((await rig.client.match(MatchRequest(keys=keys(a0)))).replicas) == 1, "it is committed"


async def test_a_lease_that_holds_nothing_of_the_prefix_is_given_back_at_once(rig):
    (a0,), (b0, b1) = of(rig, A, 1), of(rig, B, 2)
    await put(rig, [a0, b1])
    reply = await rig.client.match(leased([a0, b0, b1]))  # b0 is missing
    assert len(reply.replicas) == 1 and leases(rig) == [1, 0]
    reply = await rig.client.match(leased([b0, a0], name=8))
    assert (reply.replicas, reply.lease_id) == ([], 0)
    await asyncio.gather(*rig.client._background)
    assert leases(rig) == [1, 0]


async def test_one_number_stands_for_the_leases_of_both(rig):
    numbers = [*of(rig, A, 1), *of(rig, B, 1)]
    await put(rig, numbers)
    reply = await rig.client.match(leased(numbers))
    assert leases(rig) == [1, 1]
    renewal = RenewRequest(node_id="n", incarnation=1, lease_ids=[reply.lease_id], lease_s=60.0)
    assert (await rig.client.renew(renewal)).renewed == [True]
    rig.cores[B].state.release([], rig.clock.now(), [7])
    assert (await rig.client.renew(renewal)).renewed == [True], "the other one goes on"
    await rig.client.release(ReleaseRequest(lease_ids=[reply.lease_id]))
    assert leases(rig) == [0, 0]
    assert (await rig.client.renew(renewal)).renewed == [False]


async def test_a_lease_whose_answer_was_lost_is_given_back_by_its_name(rig):
    numbers = [*of(rig, A, 1), *of(rig, B, 1)]
    await put(rig, numbers)
    rig.ways[B].deaf = True
    reply = await rig.client.match(leased(numbers))
    assert len(reply.replicas) == 1 and leases(rig) == [1, 1]
    rig.ways[B].deaf = False
    rig.clock.advance(2.0)
    await asyncio.gather(*rig.client._background)
    assert leases(rig) == [1, 0]


async def test_a_call_that_fails_as_a_whole_leaves_no_lease_and_no_reservation_behind(rig):
    (a0, a1), (b0,) = of(rig, A, 2), of(rig, B, 1)
    await put(rig, [a0])
    rig.ways[B].core = MetadataCore(new_state(), rig.clock)  # a server of before partitions is at its address
    client = rig.connect(rig.whole)
    with pytest.raises(MetadataProtocolError):
        await client.match(leased([a0, b0]))
    with pytest.raises(MetadataProtocolError):
        await client.reserve(reservation("n", [a1, b0]))
    await asyncio.gather(*client._background)
    assert rig.cores[A].state.num_read_leases == 0
    assert rig.cores[A].state.num_reservations == 0
    rig.ways[B].core = rig.cores[B]


async def test_a_wait_is_answered_once_the_last_partition_has_its_share_and_holds_no_lease_before(rig):
    (a0, a1), (b0,) = of(rig, A, 2), of(rig, B, 1)
    await put(rig, [a0])
    replicas = granted(await rig.client.reserve(reservation("n", [b0, a1])))
    request = WaitRequest(
        **{name: getattr(leased([a0, b0, a1]), name) for name in MatchRequest.__struct_fields__},
        more_than=1,
        timeout_s=60.0,
    )
    waiting = asyncio.create_task(rig.client.wait(request))
    await until(lambda: rig.cores[B].num_waiters == 1)
    assert leases(rig) == [0, 0] and not waiting.done()
    await rig.client.commit(ids("n", replicas[:1]))
    reply = await waiting
    assert len(reply.replicas) == 2 and leases(rig) == [1, 1] and reply.num_writing == 1
    assert [core.num_waiters for core in rig.cores] == [0, 0]


async def test_a_wait_ends_when_a_partition_that_it_needs_is_away_and_waits_for_no_other(rig):
    (a0,), (b0,) = of(rig, A, 1), of(rig, B, 1)
    await put(rig, [a0])
    rig.ways[B].away = True
    reply = await rig.client.wait(WaitRequest(keys=keys(a0, b0), more_than=1, timeout_s=600.0))
    assert len(reply.replicas) == 1
    waiting = asyncio.create_task(rig.client.wait(WaitRequest(keys=keys(*of(rig, A, 2)), more_than=1, timeout_s=600.0)))
    await until(lambda: rig.cores[A].num_waiters == 1)
    await end(waiting)
    assert rig.cores[A].num_waiters == 0


async def test_a_wait_that_is_over_at_one_partition_is_over(rig):
    (a0,), (b0,) = of(rig, A, 1), of(rig, B, 1)
    waiting = asyncio.create_task(rig.client.wait(WaitRequest(keys=keys(a0, b0), more_than=1, timeout_s=600.0)))
    await until(lambda: rig.cores[A].num_waiters == rig.cores[B].num_waiters == 1)
    rig.cores[A].stop()
    assert (await waiting).replicas == [] and rig.cores[B].num_waiters == 0


async def test_who_was_away_when_holdings_were_told_is_told_all_when_it_is_back(rig):
    def request(reset: bool = False) -> TellHoldingsRequest:
        return TellHoldingsRequest(node_id="n", incarnation=1, added=keys(*range(10)), reset=reset)

    rig.ways[B].away = True
    assert (await rig.client.tell_holdings(request())).known
    rig.ways[B].away = False
    rig.clock.advance(2.0)
    assert not (await rig.client.tell_holdings(request())).known
    assert (await rig.client.tell_holdings(request(reset=True))).known
    assert (await rig.client.tell_holdings(request())).known


async def test_orders_reach_all_partitions_or_the_operator_hears_of_it(rig):
    drain = NodeOrderRequest(node_id="n", action="drain", move=True)
    rig.ways[B].away = True
    with pytest.raises(MetadataUnavailableError):
        await rig.client.order_node(drain)
    rig.ways[B].away = False
    rig.clock.advance(2.0)
    assert (await rig.client.order_node(drain)).order is not None
    assert [order.node_id for order in (await rig.client.node_orders()).orders] == ["n"]
    assert [core.state.orders.drain_of("n") for core in rig.cores] == ["move", "move"]
    undrain = msgspec.structs.replace(drain, action="undrain")
    assert not (await rig.client.order_node(undrain)).refused
    assert (await rig.client.order_node(undrain)).refused


async def test_all_partitions_even_out_their_parts_of_the_segments_and_share_the_bound(rig):
    numbers = [*of(rig, A, 20), *of(rig, B, 20)]
    await put(rig, numbers)
    await rig.register("m", 64)
    begun = await rig.client.rebalance(RebalanceRequest(action="start", most_bytes=12 * UNIT))
    assert begun.running and begun.number == 2 and begun.most_bytes == 12 * UNIT
    assert all(
        [(await part.heartbeat(HeartbeatRequest(node_id="n", incarnation=1))).sheds for part in rig.client.parts]
    )
    copied: list[ChunkKey] = []
    while (await rig.client.rebalancing()).running or copied:
        asked = MoveChunksRequest(node_id="n", incarnation=1, copied=copied, most_bytes=1 << 20, ttl_s=60.0)
        moves = (await rig.client.move_chunks(asked)).moves
        await rig.client.commit(ids("n", [move.target for move in moves]))
        copied = [move.source.key for move in moves]
    over = await rig.client.rebalancing()
    assert (over.moved_chunks, over.end) == (12, "all was moved that was to be")
    assert {each.node_id: each.used_bytes for each in over.segments} == {"n": 28 * UNIT, "m": 12 * UNIT}
    rig.ways[B].away = True
    with pytest.raises(MetadataUnavailableError):
        await rig.client.rebalance(RebalanceRequest(action="stop"))


async def test_a_drained_nodes_chunks_are_named_by_all_partitions_and_one_that_is_away_may_have_more(rig):
    numbers = [*of(rig, A, 2), *of(rig, B, 2)]
    await put(rig, numbers)
    await rig.register("m", 64)
    await rig.client.order_node(NodeOrderRequest(node_id="n", action="drain", move=True))
    asked = MoveChunksRequest(node_id="n", incarnation=1, copied=[], most_bytes=1 << 20, ttl_s=60.0)
    moves = (await rig.client.move_chunks(asked)).moves
    assert {move.source.key for move in moves} == set(keys(*numbers))
    await rig.client.commit(ids("n", [move.target for move in moves]))
    rig.ways[B].away = True
    copied = msgspec.structs.replace(asked, copied=[move.source.key for move in moves])
    reply = await rig.client.move_chunks(copied)
    assert reply.left == 1 and set(reply.in_use) == set(keys(*numbers[2:])), "it is to be told again"
    rig.ways[B].away = False
    rig.clock.advance(2.0)
    assert (await rig.client.move_chunks(msgspec.structs.replace(asked, copied=reply.in_use))).left == 0
    assert {each.segment.node_id: each.num_replicas for each in (await rig.client.stats()).segments} == {"n": 0, "m": 4}


async def test_pins_are_told_to_the_keys_partition_and_one_that_is_away_is_a_failure(rig):
    numbers = [*of(rig, A, 2), *of(rig, B, 1)]
    await put(rig, numbers)
    assert (await rig.client.pin(keys(*numbers))).done == 3
    assert [core.state.pins(None, 0.0).num_pins for core in rig.cores] == [2, 1]
    rig.ways[B].away = True
    assert {pin.key for pin in (await rig.client.pins()).pins} == set(keys(*of(rig, A, 2)))
    with pytest.raises(MetadataUnavailableError):
        await rig.client.unpin(keys(*numbers))


# --- who may speak to whom ---------------------------------------------------------------------------------------


async def test_a_client_of_another_set_does_nothing_and_says_which(rig):
    other = rig.connect(Partitions(("a", "b", "c")))
    for call in (other.match(leased([1])), other.reserve(reservation("n", [1])), other.nodes()):
        with pytest.raises(MetadataProtocolError, match=r"partitions a, b, this client .* of partitions a, b, c"):
            await call
    swapped = PartitionedMetadataClient(
        [
            MetadataClient(way, rig.clock, 5.0, speaks=replace(SPOKEN, part=part))
            for way, part in zip(rig.ways[::-1], rig.parts, strict=True)
        ],
        rig.whole,
        rig.clock,
    )
    with pytest.raises(MetadataProtocolError, match=r"is at partition [ab] of the index, this client at [ab]"):
        await swapped.match(leased(of(rig, A, 1)))
    alone = MetadataClient(rig.ways[0], rig.clock, 5.0)
    with pytest.raises(MetadataProtocolError, match="this client with an index of one server"):
        await alone.nodes()


async def test_an_older_server_is_no_partition(rig):
    core = MetadataCore(new_state(), rig.clock)
    rig.ways[A].core = core
    client = rig.connect(rig.whole)
    with pytest.raises(MetadataProtocolError, match="was started with an index of one server"):
        await client.match(leased(of(rig, A, 1)))


async def test_a_subscriber_of_another_set_hears_nothing():
    rig = PartitionRig(("a", "b"))

    class Sink:
        heard = 0

        def on_reset(self) -> None:
            self.heard += 1

        def on_events(self, events: object) -> None:
            self.heard += 1

    sink, part = Sink(), Part(Partitions(("a", "b", "c")), 0)
    stranger = IndexSubscription(
        DirectEventSource(rig.cores[0]), sink, SystemClock(), speaks=replace(SPOKEN, part=part)
    )
    task = asyncio.create_task(stranger.run())
    await until(lambda: stranger.reconnects > 0)
    assert sink.heard == 0 and not stranger.connected
    await end(task)


# --- wiring ------------------------------------------------------------------------------------------------------


async def test_a_file_with_partitions_gives_a_client_and_a_subscription_of_all():
    server = MetadataServerConfig(
        partitions=[
            PartitionConfig(name="a", port=1, standbys=["127.0.0.1:3"]),
            PartitionConfig(name="b", port=2),
        ]
    )
    endpoints = msgspec.msgpack.decode(msgspec.msgpack.encode(endpoints_of(server)), type=type(endpoints_of(server)))
    assert endpoints.urls == ("http://127.0.0.1:1", "http://127.0.0.1:3", "http://127.0.0.1:2")
    client = connect_client(endpoints, ManualClock())
    assert [part.part for part in client.parts] == [Part(Partitions(("a", "b")), number) for number in range(2)]
    asked: list[Part | None] = []

    class Sink:
        def on_reset(self) -> None: ...
        def on_events(self, events: object) -> None: ...

    def sink_of(part: Part | None) -> Sink:
        asked.append(part)
        return Sink()

    subscription = connect_subscription(endpoints, sink_of, ManualClock())
    assert asked == [part.part for part in client.parts] and not subscription.connected
    await client.aclose()
    await subscription.aclose()
    alone = connect_client(endpoints_of(MetadataServerConfig(port=1)), ManualClock())
    assert alone.parts == (alone,) and alone.part is None
    await alone.aclose()


async def test_a_node_is_known_to_each_partition_by_itself(rig):
    rig.cores[B].state.tick(rig.clock.now() + 10.0)
    nodes = await rig.client.nodes()
    assert [node.id for node in nodes.nodes] == ["n"] and len(nodes.segments) == 1
    assert (await rig.client.match(MatchRequest(keys=keys(1)))).replicas == []
    direct = MetadataClient(DirectTransport(rig.cores[B]), rig.clock, 5.0, speaks=replace(SPOKEN, part=rig.parts[B]))
    assert (await direct.nodes()).nodes == []
    assert registration("n").node in nodes.nodes


def test_what_several_partitions_name_as_orphaned_is_named_once():
    def reply(*found: tuple[str, float], unknown: str = "") -> OrphansReply:
        listed = [Orphan(id=name, name=name, age_s=age_s) for name, age_s in found]
        of_kind = OrphansOfKind(kind="segments", count=len(listed), oldest_s=listed[0].age_s, listed=listed)
        return OrphansReply(kinds=[of_kind], unknown=unknown)

    pieces = [Piece(number, None) for number in range(2)]
    merged = merge_orphans(None, pieces, [reply(("s", 3.0), ("t", 1.0)), reply(("u", 9.0), ("s", 2.0))])
    (segments,) = merged.kinds
    assert (segments.count, segments.oldest_s, [each.id for each in segments.listed]) == (3, 9.0, ["u", "s", "t"])
    both = [reply(("s", 3.0)), reply(("t", 3.0), unknown="too early")]
    assert merge_orphans(None, pieces, both).unknown == "too early"
    removed = merge_removed(None, pieces, [RemoveOrphansReply(removed=["s"]), RemoveOrphansReply(removed=["s", "t"])])
    assert removed.removed == ["s", "t"]
