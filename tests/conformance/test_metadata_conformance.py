"""What a metadata client can count on, whichever way its calls travel."""

import asyncio

import pytest
from support.metadata_rigs import end, metadata_rig, until
from support.metadata_words import granted, ids, key, keys, registration, reservation

from kvcore.errors import MetadataProtocolError
from metadata_server.cache_messages import ReleaseRequest
from metadata_server.messages import (
    Event,
    EventKind,
    HeartbeatRequest,
    LeaveRequest,
    MatchRequest,
    QuarantineItem,
    QuarantineReason,
    QuarantineRequest,
    ReplicaIds,
    WaitRequest,
)
from metadata_server.subscription import IndexSubscription


@pytest.fixture(params=["direct", "http"])
async def rig(request):
    async with metadata_rig(request.param) as rig:
        await rig.client.register(registration("a"))
        yield rig
        await until(lambda: rig.core.num_waiters == 0)
        rig.core.state.check_invariants(rig.clock.now())


async def put(rig, *numbers):
    replicas = granted(await rig.client.reserve(reservation("a", list(numbers))))
    assert (await rig.client.commit(ids("a", replicas))).committed == [True] * len(numbers)
    return replicas


class Index:
    """A sink that keeps segment -> keys."""

    def __init__(self):
        self.resets, self.nodes, self.keys = 0, set(), {}

    def on_reset(self):
        self.resets += 1
        self.nodes, self.keys = set(), {}

    def on_events(self, events: list[Event]):
        for event in events:
            held = self.keys.setdefault(event.segment_id, set())
            if event.kind is EventKind.NODE_UP:
                self.nodes.add(event.node_id)
            elif event.kind is EventKind.NODE_DOWN:
                self.nodes.discard(event.node_id)
                self.keys = {s: k for s, k in self.keys.items() if not s.startswith(event.node_id)}
            elif event.kind is EventKind.STORED:
                held.update(event.keys)
            else:
                held.difference_update(event.keys)


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "request_", "param"),
    [
        ("match", MatchRequest(keys=[b"short"]), "keys[0]"),
        ("match", MatchRequest(keys=[], lease_s=-1.0), "lease_s"),
        ("match", MatchRequest(keys=[], lease_s=float("nan")), "lease_s"),
        ("wait", WaitRequest(keys=keys(1), timeout_s=1e9), "timeout_s"),
        ("wait", WaitRequest(keys=keys(1), timeout_s=0.0, more_than=-1), "more_than"),
        ("reserve", reservation("a", [1], units=0), "items[0].length"),
        ("reserve", reservation("a", [1], ttl_s=0.0), "ttl_s"),
        ("reserve", reservation("", [1]), "node_id"),
        ("heartbeat", HeartbeatRequest(node_id="a\n", incarnation=1), "node_id"),
        ("leave", LeaveRequest(node_id="a", incarnation=-1), "incarnation"),
        ("release", ReleaseRequest(lease_ids=[0] * 65_537), "lease_ids"),
        ("commit", ReplicaIds(node_id="x" * 257, incarnation=1, replica_ids=[]), "node_id"),
        ("register", registration("a", incarnation=1 << 63), "incarnation"),
        ("register", registration("b", ttl_s=float("inf")), "ttl_s"),
    ],
)
async def test_what_is_out_of_bounds_is_refused_by_the_name_of_its_field(rig, call, request_, param):
    with pytest.raises(MetadataProtocolError) as caught:
        await getattr(rig.client, call)(request_)
    assert param in caught.value.message
    assert (await rig.client.heartbeat(HeartbeatRequest(node_id="a", incarnation=1))).known


async def test_a_wait_that_is_cancelled_leaves_no_waiter_and_no_lease(rig):
    waiting = asyncio.create_task(rig.client.wait(WaitRequest(keys=keys(1), timeout_s=30.0, lease_s=30.0)))
    await until(lambda: rig.core.num_waiters == 1)
    await end(waiting)
    await until(lambda: rig.core.num_waiters == 0)
    await put(rig, 1)
    stats = await rig.client.stats()
    assert (stats.read_leases, stats.waiters) == (0, 0)


async def test_a_wait_whose_time_is_up_answers_with_what_there_is(rig):
    (replica,) = await put(rig, 1)
    reply = await rig.client.wait(WaitRequest(keys=keys(1, 2), more_than=1, timeout_s=0.02, lease_s=1.0))
    assert reply.replicas == [[replica]] and reply.lease_id > 0
    assert (await rig.client.wait(WaitRequest(keys=keys(5), timeout_s=0.0))).replicas == []


async def test_a_wait_wakes_when_enough_is_complete_and_not_before(rig):
    waiting = asyncio.create_task(rig.client.wait(WaitRequest(keys=keys(1, 2, 3), more_than=1, timeout_s=30.0)))
    await until(lambda: rig.core.num_waiters == 1)
    await put(rig, 3)
    await put(rig, 1)
    assert not waiting.done()
    (second,) = await put(rig, 2)
    reply = await asyncio.wait_for(waiting, 60)
    assert len(reply.replicas) == 3 and reply.replicas[1] == [second]


async def test_a_wait_for_more_than_all_is_answered_once_all_is_there(rig):
    await put(rig, 1)
    assert len((await rig.client.wait(WaitRequest(keys=keys(1), more_than=5, timeout_s=30.0))).replicas) == 1


async def test_several_waiters_on_one_chunk_all_wake(rig):
    request = WaitRequest(keys=keys(1), timeout_s=30.0)
    waiting = [asyncio.create_task(rig.client.wait(request)) for _ in range(5)]
    await until(lambda: rig.core.num_waiters == 5)
    await put(rig, 1)
    assert {len(reply.replicas) for reply in await asyncio.wait_for(asyncio.gather(*waiting), 60)} == {1}


async def test_a_stopping_server_answers_its_waiters_at_once(rig):
    waiting = asyncio.create_task(rig.client.wait(WaitRequest(keys=keys(1), timeout_s=30.0)))
    await until(lambda: rig.core.num_waiters == 1)
    rig.core.stop()
    assert (await asyncio.wait_for(waiting, 20)).replicas == []


# --- one life of a chunk -----------------------------------------------------------------------------------------


async def test_a_chunk_is_reserved_committed_matched_leased_and_quarantined(rig):
    reply = await rig.client.reserve(reservation("a", [1, 2]))
    assert [s.id for s in reply.segments] == ["a.1"] and reply.segments[0].addresses == {"tcp": "a:1"}
    replicas = granted(reply)
    await rig.client.abort(ids("a", replicas[1:]))
    assert (await rig.client.commit(ids("a", replicas))).committed == [True, False]
    match = await rig.client.match(MatchRequest(keys=keys(1, 2), lease_s=10.0, node_id="a", incarnation=1))
    assert match.replicas == [[replicas[0]]] and (await rig.client.stats()).read_leases == 1
    await rig.client.release(ReleaseRequest(lease_ids=[match.lease_id]))
    item = QuarantineItem(replica=replicas[0], reason=QuarantineReason.CHECKSUM)
    await rig.client.quarantine(QuarantineRequest(items=[item]))
    stats = await rig.client.stats()
    assert (stats.objects, stats.reservations, stats.read_leases) == (0, 0, 0)
    assert stats.counters["quarantined_checksum"] == 1
    await rig.client.leave(LeaveRequest(node_id="a", incarnation=1))
    nodes = await rig.client.nodes()
    assert (nodes.nodes, nodes.segments) == ([], [])


# --- the event stream --------------------------------------------------------------------------------------------


async def test_an_index_follows_and_is_complete_from_its_first_connection_on(rig):
    await put(rig, *range(10))
    index = Index()
    subscription = IndexSubscription(rig.source, index, rig.clock)
    following = asyncio.create_task(subscription.run())
    await until(lambda: subscription.connected)
    assert index.nodes == {"a"} and index.keys["a.1"] == set(keys(*range(10))) and index.resets == 1
    await put(rig, 12)
    await until(lambda: key(12) in index.keys["a.1"])
    assert subscription.lag < 5.0 and subscription.epoch == "e1"
    await rig.client.leave(LeaveRequest(node_id="a", incarnation=1))
    await until(lambda: not index.nodes)
    assert not index.keys.get("a.1") and index.resets == 1
    await end(following)
    await until(lambda: rig.core.num_subscribers == 0)
    assert not subscription.connected
