"""The production cluster over two and three metadata servers that share the index, each killed in turn."""

import logging
from collections import Counter

import pytest
from support.sim_cluster import Variant, run_seed

from kvcore.partitions import Part

PER_BLOCK = 5


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def simulate(seeds, partitions: int, *, peaceful: bool = False) -> Counter[str]:
    happened = Counter[str]()
    for seed in seeds:
        outcome = run_seed(seed, Variant(partitions=partitions, peaceful=peaceful))
        assert not outcome.problems, f"seed {seed}\n" + "\n".join(outcome.problems)
        happened += outcome.counts
    return happened


def test_a_cluster_over_two_partitions_survives_what_comes():
    assert simulate([700], 2)["killed_partition"]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(2))
@pytest.mark.parametrize("partitions", [2, 3])
def test_no_answer_is_wrong_and_nothing_is_left_over(partitions, block):
    happened = simulate(range(700 + block * PER_BLOCK, 700 + (block + 1) * PER_BLOCK), partitions)
    assert all(happened[what] for what in ("accepted", "killed_partition", "chunks_loaded", "imported")), happened
    assert 50 * happened["failed"] <= happened["accepted"], "requests are saved from faults, but for very few"


@pytest.mark.slow
@pytest.mark.parametrize("partitions", [2, 3])
def test_in_peace_nothing_is_tried_twice_or_waited_for(partitions):
    counts = simulate(range(500, 503), partitions, peaceful=True)
    happened = ["retries", "failed", "refused", "late", "silent", "lost", "reset", "save_failed", "at_rest_checksum"]
    assert not [name for name in happened if counts[name]], counts
    assert counts["chunks_loaded"] > 0 and counts["slowest_ms"] < 3 * 1500


@pytest.mark.slow
def test_it_finds_partitions_that_give_out_the_same_bytes(monkeypatch):
    monkeypatch.setattr(Part, "slice_of", lambda part, size_bytes: (0, size_bytes // 4096 * 4096))
    problems = run_seed(700, Variant(partitions=2, peaceful=True)).problems
    assert any("the same bytes" in problem for problem in problems), problems
