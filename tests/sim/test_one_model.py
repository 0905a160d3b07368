"""A cluster in the middle of an upgrade: nodes have one or the other revision of the weights, and decoders die."""

import logging
from collections import Counter

import pytest
from support.sim_cluster import Outcome, Variant, run_seed
from support.slow import seeds

from router.requests.placement import DecoderPlacement

TWO = Variant(revisions=("v1", "v2"))


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def simulate(seed: int) -> Outcome:
    """Whatever is wrong fails the test and names the seed."""
    try:
        outcome = run_seed(seed, TWO)
    except Exception as error:
        error.add_note(f"seed {seed} of two revisions")
        raise
    assert not outcome.problems, "\n".join([f"seed {seed} of two revisions", *outcome.problems])
    return outcome


def test_an_answer_is_of_one_revision():
    simulate(1000)


@pytest.mark.slow
def test_every_answer_is_of_one_revision_whatever_dies_and_comes_back_as_what():
    totals: Counter[str] = Counter()
    for seed in range(1001, 1001 + seeds(100)):
        totals.update(simulate(seed).counts)
    happened = ["kill_node", "retries", "answers_of_v1", "answers_of_v2", "model_changed", "legs_of_another_model"]
    assert not [name for name in happened if not totals[name]], totals
    assert totals["failed"] <= totals["accepted"] // 20, "an answer fails only where nobody can go on with it"


@pytest.mark.slow
def test_it_finds_a_router_that_goes_on_with_any_weights(monkeypatch):
    monkeypatch.setattr(DecoderPlacement, "model_changed", lambda *_: None)
    assert any("is wrong" in problem for seed in range(1001, 1005) for problem in run_seed(seed, TWO).problems)
