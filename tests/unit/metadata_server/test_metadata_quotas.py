"""What a tenant may have of each segment: it pushes out its own chunks, and no other's."""

from typing import Any

import msgspec
import pytest
from support.metadata_words import (
    granted,
    ids,
    in_pieces,
    key,
    keys,
    new_state,
    piece,
    put,
    registration,
    reservation,
    segment,
    stored,
)

from kvcore.chunk_keys import owner_of
from kvcore.eviction.evictor import POLICY_NAMES
from kvcore.eviction.quotas import TenantShares
from metadata_server.cache_messages import PinRequest, UnpinRequest
from metadata_server.index.limits import IndexLimits
from metadata_server.index.state import MetadataState
from metadata_server.messages import ManifestEntry, ReserveStatus

A, B = owner_of(b"a"), owner_of(b"b")


def a_state(*nodes: str, units: int = 8, **how: Any) -> MetadataState:
    """Nodes with room for `units` chunks each, of which a tenant may have half."""
    settings = {"low_watermark": 1.0, "tenant_share": 0.5, "limits": IndexLimits(same_use_s=0.0), **how}
    state = new_state(**settings)
    for node in nodes or ("a",):
        state.register(registration(node, units=units), 0.0)
    return state


@pytest.mark.parametrize("eviction", POLICY_NAMES)
def test_a_tenant_at_its_share_pushes_out_its_own_chunks_alone(eviction):
    state = a_state(eviction=eviction)
    put(state, "a", [1, 2, 3], 0.0, owner=B)
    for number in range(100, 120):
        put(state, "a", [number], 1.0, owner=A)
        state.check_invariants(1.0)
    assert stored(state, [1, 2, 3], 1.0) == [1, 2, 3]
    assert len(stored(state, list(range(100, 120)), 1.0)) == 4
    assert 119 in stored(state, [119], 1.0)
    assert (state.counters["evicted"], state.counters["evicted_own"], state.counters["declined_full"]) == (16, 16, 0)


def test_without_a_share_a_tenant_takes_all_there_is():
    state = a_state(tenant_share=None)
    put(state, "a", [1, 2, 3], 0.0, owner=B)
    for number in range(100, 120):
        put(state, "a", [number], 1.0, owner=A)
    assert stored(state, [1, 2, 3], 1.0) == []
    assert state.counters["evicted_own"] == 0


def test_within_its_share_a_tenant_pushes_out_what_is_oldest_whoever_it_is():
    state = a_state()
    put(state, "a", [1, 2, 3, 4], 0.0, owner=B)
    put(state, "a", [11, 12], 1.0)
    put(state, "a", [21, 22, 23, 24], 2.0, owner=A)
    assert stored(state, [1, 2, 3, 4, 11, 12, 21, 22, 23, 24], 2.0) == [1, 2, 11, 12, 21, 22, 23, 24]
    assert state.counters["evicted_own"] == 0


def test_the_share_is_of_each_segment_and_others_are_filled_first():
    state = a_state("a", "b", units=4)
    put(state, "a", [1], 0.0, owner=B)
    put(state, "a", [11, 12, 13, 14], 1.0, owner=A)
    where = [state.match(keys(number), 1.0).replicas[0][0].segment_id for number in (11, 12, 13, 14)]
    assert sorted(where) == ["a.1", "a.1", "b.1", "b.1"]
    assert state.counters["evicted"] == 0


def test_what_cannot_go_makes_no_room_and_the_refusal_is_counted():
    """Of the tenant's four one is leased, one pinned, one being written; the last one goes."""
    state = a_state()
    put(state, "a", [9], 0.0, owner=B)
    put(state, "a", [1, 2, 3], 0.0, owner=A)
    lease = state.match(keys(1), 0.0, lease_s=5.0, node_id="a", incarnation=1).lease_id
    assert state.pin(PinRequest(keys=keys(2)), 0.0).done == 1
    being_written = granted(state.reserve(reservation("a", [4], owner=A), 0.0))
    put(state, "a", [5], 0.0, owner=A)
    assert stored(state, [1, 2, 3, 5, 9], 0.0) == [1, 2, 5, 9]
    state.match(keys(5), 0.0, lease_s=5.0, node_id="a", incarnation=1)
    refused = state.reserve(reservation("a", [6], owner=A), 0.0)
    assert [outcome.status for outcome in refused.outcomes] == [ReserveStatus.FULL]
    assert state.counters["declined_over_share"] == state.counters["declined_full"] == 1
    assert len(put(state, "a", [7], 0.0, owner=B)) == 1  # the segment itself has room
    state.release([lease], 0.0)
    assert len(granted(state.reserve(reservation("a", [6], owner=A), 0.0))) == 1
    state.abort(ids("a", being_written), 0.0)
    state.unpin(UnpinRequest(keys=keys(2)), 0.0)
    state.check_invariants(0.0)


@pytest.mark.parametrize("eviction", POLICY_NAMES)
def test_of_its_own_a_prefix_goes_after_what_continues_it(eviction):
    state = a_state(eviction=eviction)
    request = msgspec.structs.replace(reservation("a", [1, 2, 3, 4], owner=A), in_order=True)
    state.commit(ids("a", granted(state.reserve(request, 0.0))), 0.0)
    for number in (4, 3, 2):
        state.match(keys(number), 0.0)
        state.reserve(reservation("a", [100 + number], owner=A), 0.0)  # room that is not given back
        assert stored(state, [1, 2, 3, 4], 0.0) == list(range(1, number))


def test_room_that_rests_counts_until_it_is_free():
    state = a_state()
    rests = granted(state.reserve(reservation("a", [1, 2, 3, 4], owner=A), 0.0))
    state.abort(ids("a", rests), 0.0)
    assert granted(state.reserve(reservation("a", [5], owner=A), 0.0)) == []
    assert len(granted(state.reserve(reservation("a", [5], owner=A), 3.0))) == 1  # after the grace time
    state.check_invariants(3.0)


@pytest.mark.parametrize("how", ["at once", "in pieces"])
def test_what_is_told_with_its_owner_counts_after_a_restart_as_before(how):
    entries = [
        ManifestEntry(key=key(n), offset=n * 4096, length=4096, generation=9 - n, owner=A if n < 4 else B)
        for n in range(6)
    ]
    state = a_state(units=8) if how == "at once" else new_state(low_watermark=1.0, tenant_share=0.5)
    request = registration("a", units=8, incarnation=2, entries=entries if how == "at once" else [])
    reply = state.register(in_pieces(request) if how == "in pieces" else request, 0.0)
    if how == "in pieces":
        state.import_piece(piece("a", reply.wanted["a.2"], entries[::-1], last=True, incarnation=2), 0.0)
    state.check_invariants(0.0)
    for number in (10, 11):
        put(state, "a", [number], 1.0, owner=A, incarnation=2)
    assert stored(state, [0, 1, 2, 3, 4, 5, 10, 11], 1.0) == [0, 1, 4, 5, 10, 11], "A has its half, B lost nothing"
    assert state.counters["evicted_own"] == 2


def test_what_is_found_without_an_owner_counts_for_whoever_stores_it_again():
    """As programs of before version 5 tell it, or left it on a disk; the next one to ask is its owner."""
    entries = [ManifestEntry(key=key(n), offset=n * 4096, length=4096, generation=1) for n in range(6)]
    state = new_state(tenant_share=0.5)
    state.register(registration("a", units=8, entries=entries), 0.0)
    put(state, "a", [10], 0.0, owner=A)
    exists = state.reserve(reservation("a", [0, 1, 2, 3, 4, 5], owner=A), 0.0)
    assert {outcome.status for outcome in exists.outcomes} == {ReserveStatus.EXISTS}
    state.check_invariants(0.0)
    put(state, "a", [11], 0.0, owner=A)  # it had seven, and may have four
    assert len(stored(state, [0, 1, 2, 3, 4, 5, 10, 11], 0.0)) == 4
    assert state.counters["evicted_own"] == 4


def test_a_chunk_that_is_larger_than_the_share_is_declined_and_costs_nobody_anything():
    state = a_state()
    put(state, "a", [1, 2], 0.0, owner=A)
    assert granted(state.reserve(reservation("a", [3], units=3, owner=A), 0.0)) != []
    assert stored(state, [1, 2], 0.0) == [1]
    state = a_state()
    put(state, "a", [1], 0.0, owner=A)
    put(state, "a", [2], 0.0, owner=B)
    assert granted(state.reserve(reservation("a", [3], units=5, owner=A), 0.0)) == []
    assert stored(state, [1, 2], 0.0) == [1, 2]


def test_a_segment_that_leaves_takes_what_was_counted_along():
    state = a_state("a", "b", units=4)
    put(state, "a", [1, 2, 3, 4], 0.0, owner=A)
    state.register(registration("a", units=4, incarnation=2), 0.0)
    assert segment("a", 4, 2).id in {record.segment.id for record in state.stats(0.0, 0).segments}
    put(state, "a", [11, 12], 0.0, owner=A, incarnation=2, prefer="a.2")
    assert state.counters["evicted_own"] == 0
    state.check_invariants(0.0)


def test_a_tenant_with_a_share_of_its_own_is_held_to_that_and_the_others_to_theirs():
    """Of eight: A may have two, B all, whoever else a half."""
    shares = TenantShares(0.5, {A: 0.25, B: 1.0})
    state = a_state(shares=shares)
    for number in range(100, 106):
        put(state, "a", [number], 0.0, owner=A)
    assert len(stored(state, list(range(100, 106)), 0.0)) == 2
    for number in range(200, 206):
        put(state, "a", [number], 1.0, owner=owner_of(b"c"))
    assert len(stored(state, list(range(200, 206)), 1.0)) == 4
    for number in range(300, 308):
        put(state, "a", [number], 2.0, owner=B)
    assert len(stored(state, list(range(300, 308)), 2.0)) == 8
    state.check_invariants(2.0)


def test_a_share_that_changes_holds_from_the_next_chunk_on():
    shares = TenantShares(None, {A: 1.0})
    state = a_state(shares=shares)
    put(state, "a", [1, 2, 3, 4, 5, 6], 0.0, owner=A)
    shares.own = {A: 0.25}
    put(state, "a", [7], 1.0, owner=A)
    assert len(stored(state, [1, 2, 3, 4, 5, 6, 7], 1.0)) == 2
    shares.own = {}
    put(state, "a", [11, 12, 13, 14], 2.0, owner=A)
    assert len(stored(state, [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14], 2.0)) == 6
    state.check_invariants(2.0)


def test_nobodys_share_is_counted_where_nobody_is_limited():
    state = a_state(shares=TenantShares())
    put(state, "a", [1], 0.0, owner=A)
    assert state._index.record(state._index.rows(key(1))[0]).owner(state._index.rows(key(1))[0]) is None
