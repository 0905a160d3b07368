"""A reset of the store: what was stored before is not loaded, and KV of before is not stored as if it were of after."""

import pytest
from support.scheduler_half_rig import CHUNK, NEW, Rig, decode, keys_of

from engines.vllm.connector.orders import StepOrders
from kvcore.chunk_keys import chunk_keys, root_key

TOKENS = list(range(20))
OLD_KEYS, NEW_KEYS = keys_of(TOKENS), chunk_keys(root_key(NEW), TOKENS, CHUNK)


def saved_keys(orders: StepOrders) -> list[bytes]:
    return [place.key for order in orders.saves for place in order.chunks]


def test_a_request_that_comes_after_it_finds_nothing_of_before_and_saves_anew():
    rig = Rig(stored=OLD_KEYS)
    rig.reset()
    rig.arrive(20)
    assert rig.half.matched("r", 0) == (0, False)
    assert saved_keys(rig.run(0, 20, admit=True)) == NEW_KEYS
    rig.lookup.stored.update(NEW_KEYS)
    rig.arrive(20, name="s")
    assert rig.half.matched("s", 0) == (16, True)


@pytest.mark.parametrize("handoff", [False, True], ids=["looked_up", "handed_off"])
def test_a_request_that_waits_begins_anew(handoff):
    rig = Rig(stored=OLD_KEYS)
    rig.arrive(20, params=decode(2) if handoff else None)
    assert rig.half.matched("r", 0) == (16, True)
    rig.reset()
    assert rig.half.matched("r", 0) == (0, False)
    assert rig.lookup.questions["r"][1] == NEW_KEYS
    assert saved_keys(rig.run(0, 20, admit=True)) == NEW_KEYS


def test_a_request_that_holds_kv_of_before_saves_nothing_more_until_it_has_lost_it():
    rig = Rig()
    rig.arrive(20)
    rig.half.matched("r", 0)
    assert saved_keys(rig.run(0, 10, admit=True)) == OLD_KEYS[:1]
    rig.reset()
    assert saved_keys(rig.run(10, 10)) == []
    assert rig.half.build([], ["r"]).preempted == ("r",)
    assert rig.half.matched("r", 0) == (0, False)
    assert saved_keys(rig.run(0, 20, admit=True)) == NEW_KEYS


def test_a_request_that_loads_kv_of_before_goes_on_with_it_and_saves_nothing():
    rig = Rig(stored=OLD_KEYS[:1])
    rig.arrive(20)
    rig.load()
    rig.reset()
    rig.half.allocated("r", range(100, 105), 0)
    assert saved_keys(rig.run(8, 12)) == []
    assert rig.half.finished("r")[0] is False
    assert rig.is_empty()


def test_a_load_of_before_that_fails_leaves_nothing_of_before():
    rig = Rig(stored=OLD_KEYS)
    rig.arrive(20)
    rig.load()
    rig.reset()
    assert rig.half.matched("r", 0) == (0, False)
    assert saved_keys(rig.run(0, 20, admit=True)) == NEW_KEYS
