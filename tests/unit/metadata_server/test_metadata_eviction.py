"""Which chunk a segment evicts, by policy; and that a prefix stays as long as what continues it beside it."""

from typing import Any

import msgspec
import pytest
from support.metadata_words import granted, ids, keys, new_state, put, registration, reservation, stored

from kvcore.eviction.evictor import POLICY_NAMES
from metadata_server.index.limits import IndexLimits
from metadata_server.index.state import MetadataState
from metadata_server.messages import ManifestEntry, QuarantineItem, QuarantineReason, QuarantineRequest

EVERY_USE = IndexLimits(same_use_s=0.0)


def a_state(policy: str, *nodes: str, units: int = 4, limits: IndexLimits = EVERY_USE) -> MetadataState:
    """Nodes with room for `units` chunks each, evicting one by one."""
    state = new_state(eviction=policy, low_watermark=1.0, limits=limits)
    for node in nodes or ("a",):
        state.register(registration(node, units=units), 0.0)
    return state


def put_in_order(state: MetadataState, node: str, numbers: list[int], **how: Any) -> None:
    """As `put`, by a writer who says that each continues the one before it."""
    request = msgspec.structs.replace(reservation(node, numbers, **how), in_order=True)
    replicas = granted(state.reserve(request, 0.0))
    assert all(state.commit(ids(node, replicas), 0.0).committed) and len(replicas) == len(numbers)


def survivors(state: MetadataState, numbers: list[int], more: int) -> list[int]:
    """Which are left when so many others came, one by one."""
    for number in range(100, 100 + more):
        put(state, "a", [number], 0.0)
    state.check_invariants(0.0)
    return stored(state, numbers, 0.0)


@pytest.mark.parametrize(
    ("policy", "left"), [("lru", [1, 3]), ("fifo", [3, 4]), ("lfu", [1, 3]), ("arc", [1, 3]), ("s3fifo", [3, 4])]
)
def test_the_setting_says_which_chunks_stay(policy, left):
    """Four chunks of four prompts; the first is used once, the third twice. Then two come."""
    state = a_state(policy)
    for number in (1, 2, 3, 4):
        put(state, "a", [number], 0.0)
    for number in (3, 3, 1):
        state.match(keys(number), 0.0)
    assert survivors(state, [1, 2, 3, 4], 2) == left


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_prefix_outlives_what_continues_it(policy):
    state = a_state(policy, units=6)
    put_in_order(state, "a", [1, 2, 3])
    state.match(keys(1, 2, 3, 4), 0.0, in_order=True)  # what is not there yet is known to continue 3
    put_in_order(state, "a", [4, 5, 6])
    for _ in range(5):
        for number in (4, 5, 6):
            state.match(keys(number), 0.0)
    for number in (6, 5, 4, 3, 2):
        state.reserve(reservation("a", [100 + number]), 0.0)  # room that is not given back: nothing else can go
        assert stored(state, [1, 2, 3, 4, 5, 6], 0.0) == list(range(1, number))


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_segment_full_of_prefixes_of_what_lies_elsewhere_gives_room(policy):
    """A node brings chunks from its tier into its own segment alone."""
    state = a_state(policy, "a", "b", units=2)
    put_in_order(state, "a", [1, 2, 3, 4], prefer="a.1")
    assert state.match(keys(1, 2, 3, 4), 0.0, in_order=True).replicas[2][0].segment_id == "b.1"
    wanted = msgspec.structs.replace(reservation("a", [5], prefer="a.1"), only_preferred=True)
    placed = granted(state.reserve(wanted, 0.0))
    assert [replica.segment_id for replica in placed] == ["a.1"]
    assert stored(state, [1, 2, 3, 4], 0.0) == [1, 3, 4]
    state.check_invariants(0.0)


@pytest.mark.parametrize("policy", ["lfu", "fifo"])
def test_what_was_found_after_a_restart_is_chained_again_by_whoever_asks_for_it(policy):
    for asked in (False, True):
        state = new_state(eviction=policy, low_watermark=1.0, limits=EVERY_USE)
        entries = [
            ManifestEntry(key=key, offset=4096 * at, length=4096, generation=at + 1)
            for at, key in enumerate(keys(1, 2, 3, 4))
        ]
        state.register(registration("a", units=4, entries=entries), 0.0)
        if asked:
            state.match(keys(1, 2, 3, 4), 0.0, in_order=True)
        state.match(keys(4), 0.0)
        state.match(keys(2), 0.0)
        for number in (100, 101):
            state.reserve(reservation("a", [number]), 0.0)
        assert (stored(state, [1, 2, 3, 4], 0.0) == [1, 2]) == asked


@pytest.mark.parametrize(("pause_s", "left"), [(1.0, [2, 3, 4]), (3.0, [1, 3, 4])])
def test_one_prompts_several_uses_count_as_one(pause_s, left):
    """A prompt is stored by one node and read by another at once: that is no second use."""
    state = a_state("lfu", limits=IndexLimits(same_use_s=2.0))
    for number in (1, 2, 3, 4):
        put(state, "a", [number], 0.0)
    state.match(keys(1), pause_s)
    put(state, "a", [5], pause_s)
    assert stored(state, [1, 2, 3, 4], pause_s) == left


def test_links_to_what_is_still_to_come_are_bounded():
    """Of two chunks whose prefix was named before they came the first is forgotten: its prefix may go."""
    limits = IndexLimits(max_expected_links=1)
    state = a_state("fifo", units=4, limits=limits)
    put(state, "a", [1, 2], 0.0)
    state.match(keys(1, 3), 0.0, in_order=True)
    state.match(keys(2, 4), 0.0, in_order=True)
    put(state, "a", [3, 4], 0.0)
    for number in (100, 101):
        state.reserve(reservation("a", [number]), 0.0)
    assert stored(state, [1, 2, 3, 4], 0.0) == [2, 3]


@pytest.mark.parametrize("policy", ["fifo", "lfu"])
def test_a_prefix_that_was_refused_and_comes_again_is_the_prefix_of_what_continues_it_once_that_is_said(policy):
    state = a_state(policy, units=3)
    put_in_order(state, "a", [1, 2])
    (bad,) = state.match(keys(1), 0.0).replicas[0]
    item = QuarantineItem(replica=bad, reason=QuarantineReason.STALE)
    state.quarantine(QuarantineRequest(items=[item]), 0.0)
    state.check_invariants(0.0)
    put(state, "a", [1], 0.0)
    state.match(keys(1, 2), 0.0, in_order=True)
    for number in (2, 2, 2):
        state.match(keys(number), 0.0)
    for number in (100, 101):
        state.reserve(reservation("a", [number]), 0.0)
    state.check_invariants(0.0)
    assert stored(state, [1, 2], 0.0) == [1]


def test_a_segment_makes_room_in_small_steps():
    """However many chunks are too many by the low watermark, no call waits for all of them to go."""
    state = new_state(high_watermark=0.9, low_watermark=0.1, limits=IndexLimits(most_evicted=5))
    state.register(registration("a", units=100), 0.0)
    put(state, "a", list(range(90)), 0.0)
    evicted = []
    for number in range(100, 120):
        put(state, "a", [number], 0.0)
        evicted.append(state.counters["evicted"])
    assert evicted[:7] == [5, 5, 5, 5, 5, 10, 10] and evicted[-1] == 20
