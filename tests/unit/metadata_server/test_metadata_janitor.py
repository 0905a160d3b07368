"""What is orphaned is found by kind, and removed only where it still is: never anything of a live node."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from support.metadata_rigs import DirectTransport, end
from support.metadata_words import TTL_S, granted, key, keys, new_state, put, registration, reservation, stored
from support.mooncake_dialect import RAM, RPC, dialect_rig, ram, rpc

from kvcore.clock import ManualClock
from kvcore.config.mooncake_metadata import LivenessKind, MooncakeMetadataConfig
from kvcore.errors import MetadataUnavailableError, RecordsUnavailableError
from metadata_server import cache_messages as c
from metadata_server import messages as m
from metadata_server.account_messages import OrphansOfKind, OrphansReply, OrphansRequest, RemoveOrphansRequest
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.index.state import MetadataState
from metadata_server.janitor.limits import JanitorLimits
from metadata_server.records.base import Records
from metadata_server.records.memory import memory_records
from metadata_server.records.node_orders import NodeOrdering
from metadata_server.records.pins import PinRecords

DAY = 86_400.0


class World:
    """A metadata server over records, some time after its start."""

    def __init__(self, records: Records, clock: ManualClock, state: MetadataState | None = None) -> None:
        self.clock, self.records = clock, records
        self.state = state or new_state()
        pins, orders = PinRecords(records, clock), NodeOrdering(self.state, clock, records)
        self.core = MetadataCore(self.state, clock, pins=pins, orders=orders)
        self.core.janitor.look_after(records, None)
        self.client = MetadataClient(DirectTransport(self.core), clock, 5.0)

    async def look(self, known: tuple[str, ...] = (), older_s: float = 0.0) -> OrphansReply:
        return await self.client.orphans(OrphansRequest(known=list(known), older_s=older_s))

    async def found(self, kind: str, known: tuple[str, ...] = (), older_s: float = 0.0) -> OrphansOfKind | None:
        reply = await self.look(known, older_s)
        assert not reply.unknown
        return next((one for one in reply.kinds if one.kind == kind), None)

    async def remove(self, found: OrphansOfKind | None, known: tuple[str, ...] = (), older_s: float = 0.0) -> list[str]:
        assert found is not None
        ids = [orphan.id for orphan in found.listed]
        request = RemoveOrphansRequest(kind=found.kind, ids=ids, known=list(known), older_s=older_s)  # type: ignore[arg-type]
        reply = await self.client.remove_orphans(request)
        assert not reply.unknown and set(reply.removed) <= set(ids)
        self.state.check_invariants(self.clock.now())
        return reply.removed

    def join(self, name: str, incarnation: int = 1) -> None:
        self.state.register(registration(name, incarnation=incarnation), self.clock.now())

    async def order(self, node: str, action: str) -> None:
        await self.client.order_node(c.NodeOrderRequest(node_id=node, action=action))  # type: ignore[arg-type]


@asynccontextmanager
async def a_world(state: MetadataState | None = None) -> AsyncIterator[World]:
    clock = ManualClock()
    records = memory_records(clock)
    flushing = asyncio.ensure_future(records.run())
    yield World(records, clock, state)
    await end(flushing)


async def test_a_cluster_in_good_order_has_no_orphans():
    """With leases, reservations, pins, drains and chunks on disks, all of live nodes."""
    async with a_world() as it:
        for name in ("a", "b"):
            it.join(name)
        now = it.clock.now()
        put(it.state, "a", [1], now)
        assert it.state.match(keys(1), now, lease_s=30.0, node_id="b", incarnation=1).lease_id
        assert it.state.match(keys(1), now, lease_s=30.0).lease_id, "of one who says no name, and ends in 30 s"
        granted(it.state.reserve(reservation("b", [2]), now))
        it.state.tell_holdings(m.TellHoldingsRequest(node_id="a", incarnation=1, added=keys(3)), now)
        await it.client.pin(keys(1, 2, 3))
        await it.order("a", "drain")
        assert (await it.look()).kinds == []


async def test_a_read_lease_of_a_start_that_is_not_registered_is_found_and_ended():
    async with a_world() as it:
        it.join("a")
        put(it.state, "a", [1, 2], it.clock.now())
        lease = it.state.match(keys(1, 2), it.clock.now(), lease_s=30.0, node_id="gone", incarnation=7).lease_id
        it.clock.advance(2.0)
        found = await it.found("read_leases")
        assert found is not None and (found.count, found.oldest_s) == (1, 2.0)
        assert [(one.id, one.name) for one in found.listed] == [(str(lease), "gone (2 chunks)")]
        assert await it.remove(found) == [str(lease)] and it.state.num_read_leases == 0
        assert await it.found("read_leases") is None


async def test_a_reader_that_registers_between_looking_and_removing_keeps_its_lease():
    async with a_world() as it:
        it.join("a")
        put(it.state, "a", [1], it.clock.now())
        it.state.match(keys(1), it.clock.now(), lease_s=30.0, node_id="b", incarnation=2)
        found = await it.found("read_leases")
        it.join("b", incarnation=2)
        assert await it.remove(found) == [] and it.state.num_read_leases == 1
        it.join("b", incarnation=3)
        assert len(await it.remove(found)) == 1, "that start is over"


async def test_a_drain_of_a_node_that_nobody_knows_is_found_when_it_is_old_and_its_record_goes_too():
    async with a_world() as it:
        await it.order("old", "drain")
        await it.order("older", "remove")
        await it.order("file", "drain")
        it.clock.advance(DAY)
        await it.order("new", "drain")
        found = await it.found("node_orders", ("file",), DAY)
        assert found is not None and found.oldest_s == DAY
        assert sorted(orphan.name for orphan in found.listed) == ["old (drained)", "older (removed)"]
        assert len(await it.remove(found, ("file",), DAY)) == 2
        assert [order.node_id for order in it.state.orders.all()] == ["file", "new"]
        assert [record.key for record in (await it.records.listing("drains/")).records] == ["drains/file", "drains/new"]


async def test_a_node_that_comes_back_between_looking_and_removing_stays_drained():
    async with a_world() as it:
        await it.order("a", "drain")
        found = await it.found("node_orders")
        it.join("a")
        assert await it.remove(found) == []
        assert it.state.heartbeat(m.HeartbeatRequest(node_id="a", incarnation=1), it.clock.now()).drained == "stay"


async def test_an_order_that_was_given_anew_is_another_one():
    async with a_world() as it:
        await it.order("a", "drain")
        found = await it.found("node_orders")
        await it.order("a", "undrain")
        it.clock.advance(1.0)
        await it.order("a", "drain")
        assert await it.remove(found) == [] and it.state.orders.drained == {"a"}


async def test_a_pin_of_a_chunk_that_lies_nowhere_is_found_and_a_chunk_that_came_meanwhile_keeps_its_pin():
    async with a_world() as it:
        it.join("a")
        await it.client.pin(keys(1, 2, 3, 4, 5))
        put(it.state, "a", [1], it.clock.now())
        granted(it.state.reserve(reservation("a", [2]), it.clock.now()))
        it.state.tell_holdings(m.TellHoldingsRequest(node_id="a", incarnation=1, added=keys(3)), it.clock.now())
        it.clock.advance(3.0)
        assert await it.found("pins", older_s=3.5) is None, "its chunk may be computed yet"
        found = await it.found("pins", older_s=3.0)
        assert found is not None and {orphan.id for orphan in found.listed} == {key(4).hex(), key(5).hex()}
        put(it.state, "a", [4], it.clock.now())
        assert await it.remove(found, older_s=3.0) == [key(5).hex()]
        pinned = (await it.client.pins()).pins
        assert {(pin.key, pin.replicas) for pin in pinned} >= {(key(1), 1), (key(4), 1)} and len(pinned) == 4
        assert len((await it.records.listing("pins/")).records) == 4


async def test_a_pin_that_is_made_again_is_as_old_as_it_was():
    async with a_world() as it:
        it.join("a")
        await it.client.pin(keys(1))
        it.clock.advance(2.0)
        await it.client.pin(keys(1), 60.0)
        found = await it.found("pins")
        assert found is not None and found.oldest_s == 2.0


# --- what only a fault of ours leaves: deaths of which the index's parts were not told ----------------------------


async def test_what_a_lost_death_leaves_is_found_and_removed_whole():
    async with a_world() as it:
        it.join("a")
        it.join("b")
        now = it.clock.now()
        put(it.state, "a", [1], now, prefer="a.1")
        granted(it.state.reserve(reservation("a", [2], prefer="b.1"), now))
        it.state.match(keys(1), now, lease_s=30.0, node_id="a", incarnation=1)
        it.state.tell_holdings(m.TellHoldingsRequest(node_id="a", incarnation=1, added=keys(3)), now)
        nodes = it.state._membership._nodes
        nodes.remove(nodes["a"])
        it.clock.advance(1.0)
        reply = await it.look()
        kinds = {one.kind: one for one in reply.kinds}
        assert kinds.keys() == {"read_leases", "reservations", "segments", "holdings"}
        assert all(one.count == 1 for one in kinds.values())
        assert kinds["reservations"].oldest_s == 1.0 and kinds["segments"].listed[0].name == "a.1 (1 chunks)"
        seq = it.state.log.next_seq
        for kind in ("read_leases", "reservations", "holdings", "segments"):
            found = kinds[kind]
            request = RemoveOrphansRequest(kind=kind, ids=[found.listed[0].id], known=[], older_s=0.0)  # type: ignore[arg-type]
            assert (await it.client.remove_orphans(request)).removed == [found.listed[0].id]
        it.state.check_invariants(it.clock.now())
        assert stored(it.state, [1], it.clock.now()) == []
        assert [event.kind for event in it.state.log.since(seq)] == [m.EventKind.REMOVED], "routers are told"
        assert (await it.look()).kinds == []
        refused = it.state.commit(m.ReplicaIds(node_id="a", incarnation=1, replica_ids=[1]), it.clock.now())
        assert refused.committed == [False]


# --- when it cannot be told ---------------------------------------------------------------------------------------


async def test_while_nodes_are_still_to_be_heard_nothing_is_removed():
    async with a_world() as it:
        await it.order("a", "drain")
        found = await it.found("node_orders")
        assert found is not None
        it.state.began(it.clock.now())
        assert "still to be heard" in (await it.look()).unknown
        request = RemoveOrphansRequest(kind="node_orders", ids=[found.listed[0].id], known=[], older_s=0.0)
        reply = await it.client.remove_orphans(request)
        assert reply.unknown and not reply.removed and it.state.orders.drained == {"a"}
        it.clock.advance(TTL_S)
        assert len(await it.remove(found)) == 1


async def test_while_a_segment_is_still_told_nothing_is_removed():
    async with a_world() as it:
        await it.client.pin(keys(1))
        told = msgspec.structs.replace(registration("a"), in_pieces=True)
        it.state.register(told, it.clock.now())
        assert "1 segments have not told" in (await it.look()).unknown


async def test_a_removal_that_cannot_be_written_down_is_no_success():
    async with a_world() as it:
        await it.order("a", "drain")
        found = await it.found("node_orders")
        await it.records.aclose()
        with pytest.raises((RecordsUnavailableError, MetadataUnavailableError)):
            await it.remove(found)


async def test_of_many_the_oldest_are_listed_and_all_are_counted():
    async with a_world() as it:
        it.core.janitor._limits = JanitorLimits(most_listed=2)
        for name in "abc":
            it.clock.advance(1.0)
            await it.order(name, "drain")
        found = await it.found("node_orders")
        assert found is not None and found.count == 3 and [one.name[0] for one in found.listed] == ["a", "b"]


async def test_each_removal_leaves_a_line_in_the_log(caplog):
    async with a_world() as it:
        await it.order("a", "drain")
        with caplog.at_level(logging.INFO, "audit"):
            await it.remove(await it.found("node_orders"))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "audit"]
    assert 'what=/v1/janitor/remove_orphans on="1 node_orders" outcome="1 removed"' in line


# --- records ------------------------------------------------------------------------------------------------------


async def test_what_a_doctor_left_is_found_and_removed_unless_it_was_written_since():
    async with a_world() as it:
        await it.records.put("doctor/1", b"")
        await it.records.put("doctor/2", b"")
        found = await it.found("doctor_records")
        assert found is not None and found.count == 2 and found.oldest_s is None
        await it.records.put("doctor/2", b"")
        assert await it.remove(found) == [orphan.id for orphan in found.listed if orphan.name == "doctor/1"]
        assert [record.key for record in (await it.records.listing("doctor/")).records] == ["doctor/2"]


RDMA = b'{"buffers":[],"name":"x","protocol":"rdma"}'


async def test_memory_of_a_mooncake_client_that_is_not_registered_and_cannot_be_asked_is_found():
    async with dialect_rig() as mooncake, a_world() as it:
        it.core.janitor.look_after(mooncake.records, mooncake.dialect)
        await mooncake.dialect.put(RAM, RDMA)
        await mooncake.dialect.put("mooncake/ram/registered", RDMA)
        await mooncake.dialect.put("mooncake/rpc_meta/registered", rpc())
        await mooncake.dialect.put("mooncake/ram/asked", ram())
        await mooncake.dialect.put("of/nobody", b"1")
        found = await it.found("mooncake")
        assert found is not None and [orphan.name for orphan in found.listed] == [RAM]
        assert len(await it.remove(found)) == 1 and await mooncake.dialect.get(RAM) is None
        assert mooncake.dialect.num_keys == 4


async def test_a_mooncake_client_that_registers_meanwhile_keeps_its_memory_whatever_it_says_of_it():
    """Also one whose writing is under way as it is removed: the same value again is written anew then."""
    async with dialect_rig() as mooncake, a_world() as it:
        it.core.janitor.look_after(mooncake.records, mooncake.dialect)
        await mooncake.dialect.put(RAM, RDMA)
        found = await it.found("mooncake")
        await mooncake.dialect.put(RPC, rpc())
        assert await it.remove(found) == [] and await mooncake.dialect.get(RAM) == RDMA
        await mooncake.dialect.delete(RPC)
        original, back = mooncake.records.get, []

        async def comes_back(name: str):  # as the registration is looked for: it was not there, and is now
            record = await original(name)
            if name.endswith(RPC) and not back:
                back.append(name)
                assert record is None
                await mooncake.dialect.put(RPC, rpc())
                await mooncake.dialect.put(RAM, RDMA)
            return record

        mooncake.records.get = comes_back  # type: ignore[method-assign]
        assert await it.remove(await it.found("mooncake")) == [] and back
        assert await mooncake.dialect.get(RAM) == RDMA


async def test_with_liveness_by_time_only_time_ends_what_clients_wrote():
    async with dialect_rig(MooncakeMetadataConfig(liveness=LivenessKind.TTL)) as mooncake, a_world() as it:
        it.core.janitor.look_after(mooncake.records, mooncake.dialect)
        await mooncake.dialect.put(RAM, RDMA)
        assert await it.found("mooncake") is None


async def test_a_kind_that_this_server_does_not_keep_has_no_orphans():
    async with a_world() as it:
        request = RemoveOrphansRequest(kind="mooncake", ids=["x@1"], known=[], older_s=0.0)
        assert (await it.client.remove_orphans(request)).removed == []
