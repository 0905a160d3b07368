"""Two metadata servers over one etcd, seed by seed, in virtual time: two leaders never both grant."""

import logging
from collections import Counter

import pytest
from support.sim_leaders import run_leaders

from metadata_server.leading.election import Election


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_a_server_takes_over_and_the_others_follow():
    world = run_leaders(2)
    assert len({token for token, _ in world.grants}) > 1 and world.pinned


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_one_leader_at_a_time_grants_and_no_answered_pin_is_lost(block):
    happened: Counter[str] = Counter()
    for seed in range(block * 5, block * 5 + 5):
        world = run_leaders(seed)
        happened.update(world.trace.counts)
        happened["terms"] += len({token for token, _ in world.grants})
        happened["pinned"] += len(world.pinned)
    assert happened["terms"] > 5 and happened["pinned"] > 100
    assert all(happened[fault] for fault in ("kill", "freeze", "cut_etcd")), happened


@pytest.mark.slow
def test_it_finds_a_leader_that_does_not_look_at_its_lease(monkeypatch):
    monkeypatch.setattr(Election, "leads", property(lambda election: election._ready))
    with pytest.raises(AssertionError, match=r"granted|not one leader"):
        for seed in range(20):
            run_leaders(seed)
