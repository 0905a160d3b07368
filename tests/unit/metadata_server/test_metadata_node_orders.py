"""Drained and removed nodes at the metadata server: who may join, where chunks go, and what a restart remembers."""

import asyncio
import logging
import re

import pytest
from support.metadata_rigs import DirectTransport, end, metadata_rig
from support.metadata_words import granted, key, new_state, put, registration, reservation, stored

from kvcore.clock import ManualClock
from kvcore.errors import MetadataUnavailableError, NodeRefusedError, RecordsUnavailableError
from kvcore.types import Role
from metadata_server import messages as m
from metadata_server.cache_messages import NodeOrder, NodeOrderReply, NodeOrderRequest
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.endpoints import ENDPOINTS
from metadata_server.index.limits import IndexLimits
from metadata_server.index.state import MetadataState
from metadata_server.records.base import Records
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.memory import memory_records
from metadata_server.records.node_orders import PREFIX, NodeOrdering

NOW = ManualClock().now()


def give(state: MetadataState, action: str, node: str = "a", **fields: object) -> NodeOrderReply:
    request = NodeOrderRequest(node_id=node, action=action, **fields)  # type: ignore[arg-type]
    live = next((info for info in state.nodes(NOW).nodes if info.id == node), None)
    return state.orders.give(request, live, 100.0)


def two_nodes() -> MetadataState:
    state = new_state()
    for name in ("a", "b"):
        state.register(registration(name), NOW)
    return state


def places(reply: m.ReserveReply) -> set[str]:
    return {replica.segment_id for replica in granted(reply)}


def test_a_drained_nodes_segment_gets_no_new_chunks_and_its_own_are_read():
    state = two_nodes()
    put(state, "a", [1], NOW, prefer="a.1")
    give(state, "drain")
    assert places(state.reserve(reservation("b", [2, 3], prefer="a.1"), NOW)) == {"b.1"}
    assert places(state.reserve(reservation("a", [4]), NOW)) == {"b.1"}, "nor those of what still runs there"
    assert stored(state, [1], NOW) == [1]
    give(state, "undrain")
    assert places(state.reserve(reservation("b", [5], prefer="a.1"), NOW)) == {"a.1"}
    state.check_invariants(NOW)


def test_a_full_cluster_evicts_nothing_of_a_drained_node():
    state = new_state()
    state.register(registration("a", units=4), NOW)
    state.register(registration("b", units=4), NOW)
    put(state, "a", [1, 2, 3, 4], NOW, prefer="a.1")
    give(state, "drain")
    put(state, "b", [11, 12, 13, 14, 15, 16, 17, 18], NOW)
    assert stored(state, [1, 2, 3, 4], NOW) == [1, 2, 3, 4]


def test_without_another_node_there_is_no_room():
    state = new_state()
    state.register(registration("a"), NOW)
    give(state, "drain")
    (outcome,) = state.reserve(reservation("a", [1]), NOW).outcomes
    assert outcome.status is m.ReserveStatus.FULL


def test_a_drained_node_may_bring_chunks_of_its_disk_into_its_own_segment_and_into_no_other_drained_one():
    state = two_nodes()
    give(state, "drain", "a")
    give(state, "drain", "b")

    def only(writer: str, segment: str) -> list[m.ReserveStatus]:
        items = [m.ReserveItem(key=key(9), length=4096)]
        request = m.ReserveRequest(
            node_id=writer, incarnation=1, items=items, prefer_segment=segment, only_preferred=True, ttl_s=9.0
        )
        return [outcome.status for outcome in state.reserve(request, NOW).outcomes]

    assert only("b", "a.1") == [m.ReserveStatus.FULL]
    assert only("a", "a.1") == [m.ReserveStatus.GRANTED]


def test_a_node_learns_with_its_heartbeat_that_it_is_drained_whatever_start_it_is():
    state = two_nodes()
    beat = m.HeartbeatRequest(node_id="a", incarnation=1)
    assert state.heartbeat(beat, NOW).drained == ""
    give(state, "drain")
    assert state.heartbeat(beat, NOW).drained == "stay"
    state.register(registration("a", incarnation=2), NOW)
    assert state.heartbeat(m.HeartbeatRequest(node_id="a", incarnation=2), NOW).drained == "stay"
    give(state, "undrain")
    assert state.heartbeat(m.HeartbeatRequest(node_id="a", incarnation=2), NOW).drained == ""


def test_an_order_that_is_given_again_keeps_its_time():
    state = two_nodes()
    first = give(state, "drain").order
    request = NodeOrderRequest(node_id="a", action="drain")
    second = state.orders.give(request, None, 200.0).order
    assert first is not None and second is not None and second.since == 100.0


def test_who_is_alive_is_removed_by_force_alone_and_that_start_does_not_come_back():
    state = two_nodes()
    assert "is alive at http://a" in give(state, "remove").refused
    reply = give(state, "remove", force=True)
    assert reply.order is not None and (reply.order.kind, reply.order.incarnation) == ("removed", 1)
    with pytest.raises(NodeRefusedError, match="node a was removed"):
        state.register(registration("a"), NOW)
    state.register(registration("a", incarnation=2), NOW)
    assert state.orders.all() == []


def test_a_node_that_was_gone_when_it_was_removed_is_known_by_its_last_start():
    state = two_nodes()
    state.leave(m.LeaveRequest(node_id="a", incarnation=1), NOW)
    give(state, "remove", incarnation=1)
    with pytest.raises(NodeRefusedError):
        state.register(registration("a"), NOW)
    give(state, "undrain")
    state.register(registration("a"), NOW)


def test_a_role_holds_beside_a_drain_and_for_every_start_until_the_node_is_removed():
    state = two_nodes()
    give(state, "role", role="prefiller")
    beat = m.HeartbeatRequest(node_id="a", incarnation=1)
    assert (state.heartbeat(beat, NOW).role, state.heartbeat(beat, NOW).drained) == ("prefiller", "")
    for action, drained in (("drain", "stay"), ("undrain", "")):
        give(state, action)
        assert (state.heartbeat(beat, NOW).role, state.heartbeat(beat, NOW).drained) == ("prefiller", drained)
    assert "neither drained nor removed" in give(state, "undrain").refused
    give(state, "drain")
    reply = give(state, "role", role="decoder")
    assert reply.order is not None and (reply.order.kind, reply.order.role) == ("drained", "decoder")
    give(state, "remove", force=True)
    assert "was removed" in give(state, "role", role="prefiller").refused and state.orders.role_of("a") == ""


def test_a_store_takes_no_role_and_an_order_without_one_is_refused():
    state = new_state()
    state.register(registration("a", role=Role.STORE), NOW)
    assert "its role is store" in give(state, "role", role="decoder").refused
    assert "names no role" in give(state, "role", "b").refused and state.orders.all() == []


def test_a_node_may_register_again_under_another_role_and_readers_hear_of_it():
    state = two_nodes()
    put(state, "a", [1], NOW, prefer="a.1")
    before = state.epoch
    state.register(registration("a", role=Role.PREFILLER), NOW)
    assert {info.id: info.role for info in state.nodes(NOW).nodes}["a"] is Role.PREFILLER
    assert stored(state, [1], NOW) == [1] and state.epoch == before


@pytest.mark.parametrize(
    ("before", "action", "words"),
    [
        ([], "undrain", "neither drained nor removed"),
        (["remove"], "drain", "resume c` takes it back"),
        ([], "drain", "1 nodes are drained or removed, or have another role, already"),
    ],
)
def test_what_is_refused_changes_nothing(before: list[str], action: str, words: str) -> None:
    state = new_state(limits=IndexLimits(max_node_orders=1))
    for one in before or (["drain"] if action == "drain" else []):
        give(state, one, "c")
    orders = state.orders.all()
    assert words in give(state, action, "c" if before else "d").refused
    assert state.orders.all() == orders


# --- records ------------------------------------------------------------------------------------------------------


class Server:
    """One life of a metadata server, over records that outlive it."""

    def __init__(self, records: Records, clock: ManualClock) -> None:
        state = new_state()
        orders = NodeOrdering(state, clock, records, RecordsLimits(sweep_s=0.01))
        self.core = MetadataCore(state, clock, orders=orders)
        self.client = MetadataClient(DirectTransport(self.core), clock, 5.0)

    async def orders(self) -> list[NodeOrder]:
        return (await self.client.node_orders()).orders


async def started(records: Records, clock: ManualClock) -> Server:
    server = Server(records, clock)
    await server.core.orders.restore()
    return server


async def test_drains_and_removals_outlive_the_metadata_server():
    clock = ManualClock()
    records = memory_records(clock)
    flushing = asyncio.ensure_future(records.run())
    first = await started(records, clock)
    first.core.state.register(registration("b"), clock.now())
    drained = await first.client.order_node(NodeOrderRequest(node_id="a", action="drain"))
    removed = await first.client.order_node(NodeOrderRequest(node_id="b", action="remove", force=True))
    assert [node.id for node in (await first.client.nodes()).nodes] == []
    second = await started(records, clock)
    assert await second.orders() == [drained.order, removed.order]
    second.core.state.register(registration("a"), clock.now())
    with pytest.raises(NodeRefusedError):
        second.core.state.register(registration("b"), clock.now())
    assert not granted(second.core.state.reserve(reservation("a", [1]), clock.now()))
    await second.client.order_node(NodeOrderRequest(node_id="a", action="role", role="prefiller"))
    await second.client.order_node(NodeOrderRequest(node_id="a", action="undrain"))
    third = await started(records, clock)
    assert [(one.node_id, one.role) for one in (await third.client.node_orders()).roles] == [("a", "prefiller")]
    assert [order.node_id for order in await (await started(records, clock)).orders()] == ["b"]
    await end(flushing)


async def test_a_removal_that_ended_as_the_node_joined_anew_leaves_no_record():
    clock = ManualClock()
    records = memory_records(clock)
    flushing = asyncio.ensure_future(records.run())
    server = await started(records, clock)
    await server.client.order_node(NodeOrderRequest(node_id="a", action="remove", incarnation=1))
    server.core.state.register(registration("a", incarnation=2), clock.now())
    sweeping = asyncio.ensure_future(server.core.orders.run())
    async with asyncio.timeout(60):
        async for _ in records.watch(PREFIX):
            if not (await records.listing(PREFIX)).records:
                break
    await end(sweeping)
    await end(flushing)


async def test_an_order_that_cannot_be_written_down_is_told_to_who_gave_it():
    clock = ManualClock()
    records = memory_records(clock)
    server = await started(records, clock)
    await records.aclose()
    with pytest.raises((RecordsUnavailableError, MetadataUnavailableError)):
        await server.client.order_node(NodeOrderRequest(node_id="a", action="drain"))


# --- the log ------------------------------------------------------------------------------------------------------


async def test_each_order_leaves_a_line_with_who_what_on_what_and_the_outcome(caplog):
    with caplog.at_level(logging.INFO, "audit"):
        async with metadata_rig("http") as rig:
            await rig.client.order_node(NodeOrderRequest(node_id="a", action="drain"))
            await rig.client.order_node(NodeOrderRequest(node_id="b", action="undrain"))
    first, second = [record.getMessage() for record in caplog.records if record.name == "audit"]
    assert re.fullmatch(r'audit who="?127\.0\.0\.1:\d+"? what=/v1/nodes/order_node on="drain a" outcome=ok', first), (
        first
    )
    assert 'on="undrain b" outcome=refused' in second


def test_what_is_an_operators_order_is_audited():
    durable = {"/v1/nodes/order_node", "/v1/janitor/remove_orphans"}
    assert {row.path for row in ENDPOINTS if row.about is not None} == durable | {"/v1/nodes/rebalance"}
    assert all(row.durable for row in ENDPOINTS if row.path in durable)
