"""Clusters of one prefiller and one decoder in virtual time: whoever of them dies, every answer comes, and at once."""

import logging
import random
from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from support.sim_cluster import Variant, run_seed
from support.sim_plan import Fault, Plan, make_plan
from support.slow import seeds

SEEDS = range(seeds(100))
BACK_S = 4.0
"""After its death a node is started again."""


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def plan(seed: int, *, both: bool) -> Plan:
    """The decoder dies in the middle of an answer; `both`: then the prefiller, while it stands in."""
    dice = random.Random(f"need {seed}")
    usual = make_plan(seed)
    at_s = dice.choice(usual.requests).at_s + 0.02 + 0.2 * dice.random()
    faults = [Fault(at_s, "kill_node", ("d1",)), Fault(at_s + BACK_S, "start_node", ("d1",))]
    if both:
        later_s = at_s + 0.5 * dice.random()
        back_s = dice.choice([0.3, BACK_S + 1.0])
        faults += [Fault(later_s, "kill_node", ("p1",)), Fault(later_s + back_s, "start_node", ("p1",))]
    engine = msgspec.structs.replace(usual.engine, num_blocks=200, max_sequences=16)
    faults.sort(key=lambda fault: fault.at_s)
    return replace(usual, engine=engine, faults=faults, nodes=("p1", "d1"))


def simulate(seed: int, *, both: bool, peaceful: bool = True) -> Counter[str]:
    """Whatever is wrong fails the test and names the seed."""
    outcome = run_seed(seed, Variant(peaceful=peaceful, plan=plan(seed, both=both)))
    assert not outcome.problems, (seed, both, outcome.problems)
    return outcome.counts


def without_the_decoder(tried: range) -> Counter[str]:
    """Nothing fails, and nobody waits for the decoder, which is away for longer than anything takes."""
    totals: Counter[str] = Counter()
    for seed in tried:
        counts = simulate(seed, both=False)
        assert counts["failed"] == counts["refused"] == 0, (seed, counts)
        assert counts["slowest_ms"] < 1000 * BACK_S, (seed, counts)
        totals.update(counts)
    return totals


def test_without_its_only_decoder_a_cluster_serves_on():
    assert without_the_decoder(range(3))["in_need"] > 3


@pytest.mark.slow
def test_without_its_only_decoder_every_cluster_serves_on():
    assert without_the_decoder(SEEDS)["in_need"] > 5 * len(SEEDS)


def test_without_any_node_answers_wait_for_the_first_that_is_back():
    assert simulate(1000, both=True)["failed"] == 0


@pytest.mark.slow
def test_without_any_node_every_answer_waits_for_the_first_that_is_back():
    totals: Counter[str] = Counter()
    for seed in SEEDS:
        counts = simulate(seed, both=True)
        assert counts["failed"] == 0, (seed, counts)
        totals.update(counts)
    assert totals["refused"] and totals["in_need"] > len(SEEDS)


@pytest.mark.slow
def test_the_same_in_bad_weather():
    totals: Counter[str] = Counter()
    for seed in SEEDS:
        totals.update(simulate(seed, both=seed % 2 == 0, peaceful=False))
    assert totals["failed"] <= totals["accepted"] // 100
