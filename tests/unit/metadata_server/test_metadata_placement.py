"""Where chunks go: the whole cluster's memory is the cache, nothing is evicted while any segment has room."""

from hypothesis import given
from hypothesis import strategies as st
from support.metadata_words import UNIT, granted, keys, new_state, put, registration, reservation, segment, stored

from kvcore.extents import ExtentAllocator
from metadata_server.index.chunks.calls import CallCount
from metadata_server.index.chunks.orders import new_order
from metadata_server.index.chunks.placement import Placer
from metadata_server.index.chunks.rooms import SegmentRooms
from metadata_server.index.chunks.rows import ReplicaTable
from metadata_server.index.chunks.segments import SegmentRecord


def test_placement_prefers_the_wish_then_the_own_node_then_the_emptiest():
    state = new_state()
    for node, units in (("a", 2), ("b", 4), ("c", 8), ("store", 3)):
        state.register(registration(node, units=units), 0.0)
    wished = granted(state.reserve(reservation("a", [1], prefer="b.1"), 0.0))
    own = granted(state.reserve(reservation("a", [2, 3], prefer="gone.1"), 0.0))
    rest = granted(state.reserve(reservation("a", [4]), 0.0))
    assert [r.segment_id for r in wished + own + rest] == ["b.1", "a.1", "a.1", "c.1"]


def test_nothing_is_evicted_while_any_segment_has_room_then_the_wished_one_evicts():
    state = new_state(low_watermark=1.0)
    for node, units in (("a", 2), ("b", 4), ("c", 3)):
        state.register(registration(node, units=units), 0.0)
    put(state, "a", [1, 2, 3, 4], 0.0, prefer="b.1")
    assert [r.segment_id for r in put(state, "a", [5, 6, 7, 8, 9], 0.0, prefer="b.1")] == ["a.1"] * 2 + ["c.1"] * 3
    assert state.counters["evicted"] == 0
    assert [r.segment_id for r in put(state, "a", [10, 11], 0.0, prefer="b.1")] == ["b.1"] * 2
    assert stored(state, list(range(1, 12)), 0.0) == [1, 2, 5, 6, 7, 8, 9, 10, 11]


def test_where_the_wished_segment_has_nothing_to_evict_others_do():
    state = new_state(low_watermark=1.0)
    for node, units in (("a", 1), ("b", 1), ("c", 2)):
        state.register(registration(node, units=units), 0.0)
    put(state, "a", [1, 2, 3, 4], 0.0, prefer="b.1")
    state.match(keys(1, 2), 0.0, lease_s=60.0, node_id="c", incarnation=1)  # what lies in b.1 and a.1 is being read
    assert [r.segment_id for r in granted(state.reserve(reservation("a", [5], prefer="b.1"), 0.0))] == ["c.1"]
    assert [r.segment_id for r in granted(state.reserve(reservation("a", [6, 7], prefer="b.1"), 0.0))] == ["c.1"]
    assert stored(state, [1, 2, 3, 4], 0.0) == [1, 2]
    state.check_invariants(0.0)


def test_an_empty_segment_takes_a_chunk_that_is_longer_than_its_watermark():
    state = new_state(high_watermark=0.6, low_watermark=0.3)
    for node in ("a", "b"):
        state.register(registration(node, units=3), 0.0)
    placed = put(state, "a", [1, 2], 0.0, units=2, prefer="b.1")
    assert [r.segment_id for r in placed] == ["b.1", "a.1"] and state.counters["evicted"] == 0
    (third,) = put(state, "a", [3], 0.0, units=2, prefer="b.1")
    assert third.segment_id == "b.1" and stored(state, [1, 2, 3], 0.0) == [2, 3]


def test_the_wished_segment_does_not_evict_what_is_young_while_old_chunks_lie_elsewhere():
    state = new_state(low_watermark=1.0)
    for node, units in (("p", 0), ("d", 2), ("s", 4)):
        state.register(registration(node, units=units), 0.0)
    put(state, "p", [1, 2, 3, 4], 0.0, prefer="s.1")
    put(state, "p", [5, 6], 0.0, prefer="d.1")
    for _ in range(10):
        state.match(keys(5), 0.0)
        state.match(keys(6), 0.0)
    placed = put(state, "p", [7, 8], 0.0, prefer="d.1")
    assert [r.segment_id for r in placed] == ["s.1", "s.1"]
    assert stored(state, list(range(1, 9)), 0.0) == [1, 2, 5, 6, 7, 8]


def test_a_full_cluster_forgets_what_is_old_wherever_it_lies():
    """All chunks are wished into the decoder's 8 of 200 places: a new working set drives the old one out of all."""
    state = new_state(high_watermark=0.95, low_watermark=0.85)
    for node, units in (("p", 0), ("d", 8), ("s1", 64), ("s2", 64), ("s3", 64)):
        state.register(registration(node, units=units), 0.0)
    prompts = [[1000 * prompt + chunk for chunk in range(5)] for prompt in range(1, 71)]
    for prompt in prompts:
        put(state, "p", prompt, 0.0, prefer="d.1")
    new = prompts[40:]
    assert [state.complete_prefix(keys(*prompt), 0.0) for prompt in new] == [5] * 30
    assert len([n for prompt in prompts for n in stored(state, prompt, 0.0)]) <= 0.95 * 200


def test_a_small_decoder_beside_large_others_keeps_every_prompt():
    """60 prompts of 32 chunks, 2 MiB at the decoder, 8 MiB each at the prefiller and at a store."""
    state = new_state(high_watermark=0.95, low_watermark=0.9)
    for node, units in (("p0", 2048), ("s0", 2048), ("d0", 512)):
        state.register(registration(node, units=units), 0.0)
    prompts = [[1000 * prompt + chunk for chunk in range(32)] for prompt in range(1, 61)]
    for prompt in prompts:
        put(state, "p0", prompt, 0.0, prefer="d0.1")
    assert state.counters["evicted"] == 0
    assert [state.complete_prefix(keys(*prompt), 0.0) for prompt in prompts] == [32] * 60


def test_a_prompt_without_a_wish_stays_together():
    state = new_state()
    state.register(registration("router", units=0), 0.0)
    for number in range(8):
        state.register(registration(f"s{number}", units=16), 0.0)
    for prompt in range(8):
        placed = put(state, "router", [100 * prompt + chunk for chunk in range(16)], 0.0)
        assert len({r.segment_id for r in placed}) == 1
    assert state.counters["evicted"] == 0


def new_rooms(sizes: list[int]) -> tuple[SegmentRooms, list[SegmentRecord]]:
    rooms, table, calls = SegmentRooms(), ReplicaTable(), CallCount()
    records = [
        SegmentRecord(
            *(segment(f"s{at}", units=units), ExtentAllocator(units * UNIT), calls),
            table=table,
            order=new_order("lru", table, calls),
        )
        for at, units in enumerate(sizes)
    ]
    for record in records:
        rooms.add(record)
    return rooms, records


class LookedAt(SegmentRecord):
    """Counts how often any segment is looked at."""

    looks = 0

    @property
    def room(self) -> int:
        LookedAt.looks += 1
        return super().room

    @property
    def oldest_use(self) -> int | None:
        LookedAt.looks += 1
        return super().oldest_use


def test_a_request_looks_at_few_of_a_thousand_segments_whether_they_have_room_or_evict():
    state = new_state(low_watermark=1.0)
    for number in range(1000):
        state.register(registration(f"s{number}", units=2), 0.0)
    state.register(registration("w", units=0), 0.0)
    for record in state._nodes.segments.values():
        record.__class__ = LookedAt
    LookedAt.looks = 0
    for number in range(4000):
        put(state, "w", [number], 0.0)
    assert state.counters["evicted"] == 2000 and stored(state, list(range(4000)), 0.0) == list(range(2000, 4000))
    assert LookedAt.looks <= 1000 + 10 * 4000


@given(
    units=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=25),
    prefer=st.none() | st.integers(0, 4),
    own=st.none() | st.integers(0, 4),
    banned=st.sets(st.integers(0, 4)),
)
def test_a_placer_declines_or_evicts_only_where_no_segment_has_room(units, lengths, prefer, own, banned):
    rooms, records = new_rooms(units)
    placer = Placer(
        rooms,
        prefer=records[prefer] if prefer is not None and prefer < len(records) else None,
        own=[records[own]] if own is not None and own < len(records) else [],
    )
    for at, length in enumerate(lengths):
        without = {f"s{number}.1" for number in banned} if at % 2 else set()
        fits = any(r.allocator.largest_free >= length * UNIT for r in records if r.segment.id not in without)
        place = placer.place(length * UNIT, 1, without)
        assert (place is not None) == fits and not placer.evicted
        assert place is None or place.record.segment.id not in without


@given(uses=st.lists(st.integers(0, 11), max_size=60), share=st.integers(1, 3))
def test_what_the_wished_segment_evicts_is_half_as_old_as_the_oldest_at_least(uses, share):
    state = new_state(low_watermark=1.0)
    for node, units in (("w", 0), ("d", 4 * share), ("s", 12 - 4 * share or 4)):
        state.register(registration(node, units=units), 0.0)
    every = list(range(16))
    put(state, "w", every, 0.0, prefer="d.1")
    last = dict.fromkeys(every, 0)
    for at, number in enumerate(uses, 1):
        state.match(keys(number), 0.0)
        last[number] = at
    index = state._index
    before = {key: index.record(row).segment.id for key, row in index.complete.items()}
    put(state, "w", [99], 0.0, prefer="d.1")
    after = set(index.complete)
    ages = {number: len(uses) + 1 - last[number] for number in every if before.get(keys(number)[0])}
    (gone,) = (number for number in ages if keys(number)[0] not in after)
    same = [age for number, age in ages.items() if before[keys(number)[0]] == before[keys(gone)[0]]]
    assert ages[gone] == max(same) and 2 * ages[gone] >= max(ages.values()) - 1
