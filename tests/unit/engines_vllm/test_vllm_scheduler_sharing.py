"""Requests that begin alike, at once: one loads what the store has, the others wait and find it in vLLM's cache."""

import pytest
from support.scheduler_half_rig import BLOCKS, Rig, decode, keys_of

from engines.vllm.connector.limits import ConnectorLimits

STORED = keys_of(list(range(40)))
WAIT, NAMES = (None, False), "bcd"


def crowd(num_stored: int = 2, lengths: tuple[int, ...] = (20, 20, 20, 20), **how: bool) -> Rig:
    """A rig in which `a` is loading, and `b`, `c`, `d` have arrived: all begin alike. Chunks are of 8 tokens."""
    rig = Rig(stored=STORED[:num_stored], **how)
    for name, length in zip("abcd", lengths, strict=True):
        rig.arrive(length, name=name)
    rig.load(name="a")
    return rig


def said(rig: Rig, num_local: int = 0, names: str = NAMES) -> list[object]:
    return [rig.half.matched(name, num_local) for name in names]


def test_the_others_wait_hold_no_blocks_and_load_nothing_once_it_has_come():
    rig = crowd()
    for _ in range(3):
        assert said(rig) == [WAIT] * 3
    assert repr(rig.half._loaders) == "<SharedLoads of 1 requests>"
    rig.run(16, 4, name="a", admit=True)
    assert said(rig, num_local=16) == [(0, False)] * 3
    assert repr(rig.half._loaders) == "<SharedLoads of 0 requests>"


def test_what_the_store_has_beyond_it_is_loaded_once_too():
    """`a` ends where the others have two chunks more."""
    rig = crowd(num_stored=4, lengths=(20, 36, 36, 40))
    assert said(rig) == [WAIT] * 3
    rig.run(16, 4, name="a", admit=True)
    order = rig.load(16, name="b")
    assert [place.key for place in order.chunks] == STORED[2:4]
    assert said(rig, 16, "cd") == [WAIT] * 2
    rig.run(32, 4, name="b", admit=True)
    assert said(rig, 32, "cd") == [(0, False)] * 2


def test_after_a_load_that_fails_they_load_side_by_side():
    """One after the other, each would wait for the failures of all before it."""
    rig = crowd()
    assert said(rig) == [WAIT] * 3
    assert rig.half.matched("a", 0) == (0, False)
    for name in NAMES:
        assert len(rig.load(name=name).chunks) == 2


def test_of_a_load_that_came_in_part_the_rest_is_tried_by_one_and_then_side_by_side():
    rig = crowd()
    assert said(rig) == [WAIT] * 3
    rig.run(8, 12, name="a", admit=True)
    assert len(rig.load(8, name="b").chunks) == 1
    assert said(rig, 8, "cd") == [WAIT] * 2
    assert rig.half.matched("b", 8) == (0, False)
    assert said(rig, 8, "cd") == [(8, True)] * 2


@pytest.mark.parametrize("how", ["aborted", "preempted"])
def test_a_load_that_was_given_up_says_nothing_and_another_is_waited_for(how):
    rig = crowd()
    assert said(rig) == [WAIT] * 3
    if how == "aborted":
        rig.half.finished("a")
    else:
        rig.half.build([], ["a"])
    rig.load(name="b")
    assert said(rig, names="cd") == [WAIT] * 2


def test_nobody_waits_longer_than_the_bound():
    rig = crowd()
    assert said(rig) == [WAIT] * 3
    rig.clock.advance(ConnectorLimits().follow_s)
    assert said(rig) == [(16, True)] * 3


def test_without_a_prefix_cache_each_loads_its_own():
    assert said(crowd(share_loads=False)) == [(16, True)] * 3


def test_tenants_do_not_wait_for_each_other():
    rig = crowd()
    rig.lookup.stored |= set(keys_of(list(range(20)), b"tenant"))
    rig.arrive(20, name="e", salt=b"tenant")
    assert rig.half.matched("e", 0) == (16, True)


@pytest.mark.parametrize(
    ("length", "tail", "said_to_it"),
    [(20, True, WAIT), (20, False, (16, True)), (25, True, (25, True))],
    ids=["alike", "without_its_tail", "longer"],
)
def test_a_load_that_waits_for_a_prefiller_is_waited_for_by_those_that_end_as_it_does(length, tail, said_to_it):
    """The others' own chunks may come earlier."""
    rig = Rig()
    rig.arrive(20, name="a", params=decode(2, tail=True))
    rig.load(name="a")
    rig.arrive(length, name="b", params=decode(length // 8, tail=tail))
    assert rig.half.matched("b", 0) == said_to_it
    rig.half.allocated("a", BLOCKS, 0)
    assert rig.half.matched("b", 16) in [(length - 16, True), (0, False)]
