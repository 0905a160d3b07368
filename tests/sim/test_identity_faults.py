"""Foreign nodes, second processes of one id, and clocks that step back, in the whole cluster under virtual time.

`run_seed(SEED, Variant(strangers=True, peaceful=SEED % 2 == 0))` of `support.sim_cluster` replays one.
"""

import logging
from collections import Counter

import pytest
from support.sim_cluster import Variant, run_seed
from support.slow import seeds, slow_but

from kvcore.errors import NodeRefusedError
from kvcore.identity import ClusterIdentity
from metadata_server.index import nodes as registry

BLOCKS, PER_BLOCK = range(seeds(26)), 4


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def simulate(seed: int):
    """Every second one without other faults."""
    return run_seed(seed, Variant(strangers=True, peaceful=seed % 2 == 0))


@pytest.mark.parametrize("block", slow_but([0], BLOCKS))
def test_every_request_is_answered_by_the_clusters_own_nodes_and_all_are_back_in_the_end(block):
    counts: Counter[str] = Counter()
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        outcome = simulate(seed)
        assert not outcome.problems, f"seed {seed}: " + "\n".join(outcome.problems)
        counts.update(outcome.counts)
        assert seed % 2 or not outcome.counts["failed"]
    happened = ["foreign", "twin", "step_clock", "kill_node", "nodes_refused", "accepted"]
    assert not [name for name in happened if not counts[name]], counts
    assert counts["failed"] <= 1


def found(seed: int, problem: str) -> bool:
    return any(problem in said for said in simulate(seed).problems)


@pytest.mark.slow
def test_it_finds_a_cluster_that_lets_foreign_nodes_in(monkeypatch):
    monkeypatch.setattr(ClusterIdentity, "why_foreign", lambda *_: None)
    assert found(0, "is wrong")


@pytest.mark.slow
def test_it_finds_an_index_that_gives_a_live_nodes_place_away(monkeypatch):
    monkeypatch.setattr(registry, "_check_takes_place", lambda *_: None)
    assert found(0, "has lost its place")


@pytest.mark.slow
def test_it_finds_an_index_that_orders_starts_by_their_clocks(monkeypatch):
    def later_only(info, live):
        if info.incarnation < live.info.incarnation:
            raise NodeRefusedError("older")

    monkeypatch.setattr(registry, "_check_takes_place", later_only)
    assert any(found(seed, "started again and is not known") for seed in (2, 4, 6, 8))
