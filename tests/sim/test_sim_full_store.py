"""A store without room for a chunk, or for few: every answer is right, and no prompt is computed in vain."""

import dataclasses
import logging
from collections import Counter

import pytest
from support.sim_cluster import Variant, run_seed
from support.sim_plan import make_plan
from support.slow import seeds

BLOCKS, PER_BLOCK = seeds(11), 10
ROOM = 4096
"""What one chunk takes in a segment."""


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def counts_of(seed: int, segment_bytes: int, *, peaceful: bool):
    plan = dataclasses.replace(make_plan(seed), segment_bytes=segment_bytes)
    if peaceful:
        plan = dataclasses.replace(plan, faults=[])
    outcome = run_seed(seed, Variant(peaceful=peaceful, plan=plan))
    assert not outcome.problems, (seed, segment_bytes, outcome.problems)
    return outcome.counts


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_with_room_for_none_or_few_every_answer_is_right(block):
    totals = Counter()
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        totals += counts_of(seed, ROOM * (seed % 3) or ROOM // 2, peaceful=False)
    assert totals["declined_full"] and totals["prefills_without_room"] and totals["chunks_stored"]


@pytest.mark.parametrize("seed", range(700, 702))
def test_in_peace_a_full_store_costs_no_prompt_twice_and_no_time(seed):
    without = counts_of(seed, ROOM // 2, peaceful=True)
    assert without["prefills_without_room"] and not without["chunks_stored"]
    usual = counts_of(seed, ROOM * 40, peaceful=True)
    assert without["slowest_ms"] < usual["slowest_ms"] + 500
