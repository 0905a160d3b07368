"""The whole cluster under two metadata servers: the leader is killed, stands still past its lease, or is cut off.

Every request is answered, no two servers grant for one term, and the new leader's index is what lies in the segments.
"""

import logging
from collections import Counter

import pytest
from support.sim_cluster import Variant, run_seed
from support.sim_pair import pair_plan

from metadata_server.leading.election import Election

BLOCKS, PER_BLOCK = 4, 5
FAULTS = ("server_kill", "server_freeze", "server_cut_records", "server_cut_off")


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def counts_of(seed: int, *, peaceful: bool) -> Counter[str]:
    """`peaceful`: nothing fails but servers and nodes."""
    outcome = run_seed(seed, Variant(peaceful=peaceful, plan=pair_plan(seed), pair=True))
    assert not outcome.problems, (seed, outcome.problems)
    return outcome.counts


def test_requests_are_answered_while_leaders_die():
    counts = counts_of(1, peaceful=True)
    assert counts["accepted"] and not counts["failed"] and any(counts[fault] for fault in FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_two_grant_and_the_index_is_what_lies_in_the_segments(block):
    totals = Counter[str]()
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        peaceful = counts_of(seed, peaceful=True)
        assert not peaceful["failed"], f"seed {seed}"
        totals += peaceful + counts_of(seed, peaceful=False)
    happened = [*FAULTS, "kill_node", "chunks_loaded", "imported", "index_resets"]
    assert all(totals[name] for name in happened), totals
    assert totals["failed"] <= totals["accepted"] // 100


@pytest.mark.slow
def test_it_finds_a_leader_that_does_not_look_at_its_lease(monkeypatch):
    monkeypatch.setattr(Election, "leads", property(lambda election: election._ready))
    with pytest.raises(AssertionError, match="granted"):
        for seed in range(12):
            counts_of(seed, peaceful=True)
