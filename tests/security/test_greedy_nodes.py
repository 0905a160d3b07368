"""A node, or a tenant by nodes, that takes more of the metadata server than any needs: others keep their part."""

import asyncio
import logging

import msgspec
import pytest
from msgspec.structs import replace
from support.metadata_words import entry, granted, ids, key, keys, new_state, put, registration, reservation

from kvcore.chunk_keys import owner_of
from kvcore.clock import ManualClock
from kvcore.errors import NodeRefusedError, OverloadedError
from kvcore.types import OwnerTag
from metadata_server.core import MetadataCore
from metadata_server.index.limits import IndexLimits
from metadata_server.limits import ClientLimits, ServerLimits
from metadata_server.messages import (
    FindHoldersRequest,
    LeaveRequest,
    ReplicaRef,
    ReserveReply,
    TellHoldingsRequest,
    WaitRequest,
)
from metadata_server.protocol import encode

NO_BOUND = 1 << 40
UNITS = 32
GREEDY, VICTIM = owner_of(b"greedy"), owner_of(b"victim")


@pytest.mark.parametrize("most", [NO_BOUND, 16])
def test_one_node_does_not_reserve_all_room(most: int):
    state = new_state(limits=IndexLimits(max_reserved_of_node=most))
    for name in ("a", "b"):
        state.register(registration(name, UNITS), 0.0)

    def reserve(name: str, first: int, count: int = 10, now: float = 0.0) -> list[ReplicaRef]:
        return granted(state.reserve(reservation(name, [*range(first, first + count)]), now))

    taken = [ref for call in range(10) for ref in reserve("a", 10 * call)]
    others = reserve("b", 1000)
    if most == NO_BOUND:
        assert len(taken) == 2 * UNITS and not others, "the attack"
        return
    assert len(taken) == most and len(others) == 10
    assert state.counters["declined_too_many"] == 100 - most
    state.commit(ids("a", taken[:4]), 0.0)
    state.abort(ids("a", taken[4:6]), 0.0)
    assert len(reserve("a", 200)) == 6, "what it has written is no claim"
    state.renew_all_nodes(61.0)
    state.tick(61.0)
    assert len(reserve("a", 300, 20, now=61.0)) == most
    state.check_invariants(61.0)


@pytest.mark.parametrize("most", [NO_BOUND, 50])
def test_one_node_does_not_fill_what_is_known_of_all_disks(most: int):
    state = new_state(limits=IndexLimits(max_tier_keys=100, max_tier_keys_of_node=most))
    for name in ("a", "b"):
        state.register(registration(name), 0.0)

    def tell(name: str, added: list[int], removed: list[int] = [], *, reset: bool = False) -> None:  # noqa: B006
        request = TellHoldingsRequest(
            node_id=name, incarnation=1, added=keys(*added), removed=keys(*removed), reset=reset
        )
        state.tell_holdings(request, 0.0)

    def is_known(number: int) -> bool:
        return bool(state.find_holders(FindHoldersRequest(keys=keys(number)), 0.0).holders)

    for _ in range(3):
        tell("a", [*range(1000, 1300)])
    tell("b", [1, 2, 3])
    assert is_known(1) is (most != NO_BOUND)
    if most == NO_BOUND:
        return
    assert [is_known(number) for number in (1000, 1049, 1050)] == [True, True, False]
    tell("a", [1200, 1201], removed=[1000, 1001, 1002, 1250])
    assert [is_known(number) for number in (1200, 1201, 1002)] == [True, True, False], "room for three"
    tell("a", [5], reset=True)
    tell("a", [*range(2000, 2300)])
    assert [is_known(number) for number in (5, 2048, 2049, 1)] == [True, True, False, True]


@pytest.mark.parametrize("most", [NO_BOUND, 10])
async def test_one_node_does_not_take_all_places_of_those_who_wait(most: int):
    clock = ManualClock()
    core = MetadataCore(new_state(), clock, ServerLimits(max_waiters=20, max_waiters_per_node=most))
    for name in ("a", "b"):
        core.register(registration(name), clock.now())

    def wait(name: str) -> "asyncio.Task[object]":
        request = WaitRequest(keys=[key(1)], timeout_s=60.0, node_id=name, incarnation=1)
        return asyncio.create_task(core.wait(request, clock.now()))

    flood = [wait("a") for _ in range(100)]
    for _ in range(3):
        await asyncio.sleep(0)
    victim = wait("b")
    for _ in range(3):
        await asyncio.sleep(0)
    assert victim.done() is (most == NO_BOUND), "one that is answered at once has to ask again and again"
    assert sum(not task.done() for task in flood) == min(most, 20)
    for task in [*flood, victim]:
        task.cancel()
    await asyncio.gather(*flood, victim, return_exceptions=True)
    assert core.num_waiters == 0
    again = wait("a")
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()


@pytest.mark.parametrize("share", [1.0, 0.8])
def test_one_tenant_does_not_hold_all_leases_of_a_node_or_of_all(share: float):
    """Its requests come by the router, and every node reads for it."""
    state = new_state(limits=IndexLimits(max_read_leases=100, max_leases_per_node=40, owners_share=share))
    nodes = [f"n{number}" for number in range(4)]
    for name in nodes:
        state.register(registration(name), 0.0)
    put(state, "n0", [1], 0.0)

    def read(node: str, owner: OwnerTag | None, count: int) -> list[int]:
        asked = [
            state.match(keys(1), 0.0, lease_s=60.0, node_id=node, incarnation=1, owner=owner) for _ in range(count)
        ]
        return [reply.lease_id for reply in asked if reply.lease_id]

    held = [lease for node in nodes for lease in read(node, GREEDY, 100)]
    victims = read("n0", VICTIM, 5)
    state.check_invariants(0.0)
    if share == 1.0:
        assert len(held) == 100 and not victims, "the attack"
        return
    assert len(held) == 80 and len(victims) == 5
    assert state.counters["leases_over_share"] == 400 - 80
    assert len(read("n0", None, 2)) == 2, "of whom it is not known whose it reads nothing is held back"
    state.release(held[:3], 0.0)
    assert len(read("n3", GREEDY, 10)) == 3, "what it gave back it may have again"
    state.check_invariants(0.0)


def test_a_tenant_has_its_share_of_one_nodes_leases_alone():
    state = new_state(limits=IndexLimits(max_leases_per_node=10))
    for name in ("a", "b"):
        state.register(registration(name), 0.0)
    put(state, "a", [1], 0.0)

    def read(node: str, owner: OwnerTag) -> int:
        asked = (state.match(keys(1), 0.0, lease_s=9.0, node_id=node, incarnation=1, owner=owner) for _ in range(20))
        return sum(bool(reply.lease_id) for reply in asked)

    assert (read("a", GREEDY), read("a", VICTIM), read("b", VICTIM)) == (8, 2, 8)
    state.leave(LeaveRequest(node_id="a", incarnation=1), 0.0)
    state.check_invariants(0.0)


@pytest.mark.parametrize("most", [NO_BOUND, 8])
async def test_one_tenant_does_not_take_all_places_of_those_who_wait(most: int):
    clock = ManualClock()
    core = MetadataCore(new_state(), clock, ServerLimits(max_waiters=10, max_waiters_per_owner=most))
    for number in range(20):
        core.register(registration(f"n{number}"), clock.now())

    def wait(node: int, owner: OwnerTag) -> "asyncio.Task[object]":
        request = WaitRequest(keys=[key(1)], timeout_s=60.0, node_id=f"n{node}", incarnation=1, owner=owner)
        return asyncio.create_task(core.wait(request, clock.now()))

    flood = [wait(node, GREEDY) for node in range(20)]
    await asyncio.sleep(0)
    victim = wait(0, VICTIM)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert victim.done() is (most == NO_BOUND)
    for task in [*flood, victim]:
        task.cancel()
    await asyncio.gather(*flood, victim, return_exceptions=True)
    assert core.num_waiters == 0 and not core.floods._waits_of and not core.floods._waits


@pytest.mark.parametrize("most", [NO_BOUND, 40])
async def test_one_node_does_not_churn_what_others_stored_without_end(most: int, caplog: pytest.LogCaptureFixture):
    """It reserves, commits and reserves again, as fast as it is answered: each chunk evicts one and is two events."""
    clock = ManualClock()
    limits = ServerLimits(most_reserved=most, reserved_per_s=0.0 if most == NO_BOUND else 10.0)
    core = MetadataCore(new_state(event_log=64), clock, limits)
    for name in ("a", "b"):
        core.register(registration(name, UNITS), clock.now())

    async def reserve(name: str, first: int) -> list[ReplicaRef]:
        body = encode(reservation(name, [*range(first, first + 8)]), json=False)
        reply = msgspec.msgpack.decode(await core.dispatch("/v1/objects/reserve", body), type=ReserveReply)
        assert len(reply.outcomes) == 8
        return granted(reply)

    (others, *_) = [await reserve("b", 0)]
    core.state.commit(ids("b", others), clock.now())
    began, taken = core.state.log.next_seq, 0
    with caplog.at_level(logging.WARNING):
        for call in range(1, 50):
            refs = await reserve("a", 100 * call)
            core.state.commit(ids("a", refs), clock.now())
            taken += len(refs)
    flooded = not core.state.log.has(core.state.epoch, began)
    gone = core.state.complete_prefix(keys(*range(8)), clock.now()) < 8
    assert flooded is gone is (most == NO_BOUND), "a subscriber begins anew, and the others' chunks are evicted"
    if most == NO_BOUND:
        return
    assert taken == most and core.state.counters["declined_too_fast"] == 49 * 8 - most
    assert sum("node_floods" in line for line in caplog.messages) == 1
    assert len(await reserve("b", 8)) == 8, "others go on"
    clock.advance(0.5)
    assert len(await reserve("a", 9000)) == 5


@pytest.mark.parametrize("most", [NO_BOUND, 5])
def test_one_node_does_not_flood_subscribers_by_coming_and_going(most: int, caplog: pytest.LogCaptureFixture):
    clock = ManualClock()
    core = MetadataCore(new_state(event_log=64), clock, ServerLimits(most_registrations=most, registrations_per_s=0.5))
    full = registration("a", entries=[entry(number, number) for number in range(16)])
    began, refused = core.state.log.next_seq, 0
    with caplog.at_level(logging.WARNING):
        for _ in range(200):
            try:
                core.register(full, clock.now())
                core.state.leave(LeaveRequest(node_id="a", incarnation=1), clock.now())
            except OverloadedError as error:
                assert "node a has registered 5 times" in error.message
                refused += 1
    lost = not core.state.log.has(core.state.epoch, began)
    assert lost is (most == NO_BOUND), "a subscriber that was there has to begin anew"
    if most == NO_BOUND:
        return
    assert refused == core.state.counters["registrations_refused"] == 195
    assert sum("node_floods" in line for line in caplog.messages) == 1
    core.register(registration("b"), clock.now())
    clock.advance(4.0)
    for _ in range(2):
        core.register(full, clock.now())
    with pytest.raises(OverloadedError):
        core.register(full, clock.now())


def test_a_second_process_of_a_nodes_name_takes_no_registration_from_it():
    clock = ManualClock()
    core = MetadataCore(new_state(), clock, ServerLimits(most_registrations=2, registrations_per_s=0.1))
    core.register(registration("a"), clock.now())
    twin = registration("a", incarnation=7)
    twin = replace(twin, node=replace(twin.node, control_url="http://elsewhere:1"))
    for _ in range(20):
        with pytest.raises(NodeRefusedError):
            core.register(twin, clock.now())
    core.register(registration("a"), clock.now())


def test_nodes_that_registered_long_ago_are_not_remembered():
    clock = ManualClock()
    core = MetadataCore(new_state(), clock, ServerLimits(max_registering=10))
    for number in range(100):
        core.register(registration(f"n{number}", units=0), clock.now())
        clock.advance(1.0)
    assert len(core.floods._registrations) <= 10


def test_honest_nodes_do_not_meet_these_bounds():
    index, server = IndexLimits(), ServerLimits()
    assert index.max_reserved_of_node >= 65_536, "a whole segment of so many chunks may be on its way at once"
    assert index.max_tier_keys_of_node >= 20 * 65_536, "a disk of twenty times that"
    assert server.max_waiters_per_node >= 2 * ClientLimits().max_waits, "its engine, and another one that takes over"
    assert server.most_reserved >= 8 * 65_536, "eight whole segments in a row"
    assert server.reserved_per_s >= 10 * 6000, "ten times what a node of eight fast GPUs stores, in chunks of 16 tokens"
    assert server.most_registrations >= 60, "each second for a minute, as where its engine does not come up"
