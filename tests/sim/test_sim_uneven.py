"""Small segments of decoders beside large ones of stores: what has no room in the one lies in the others."""

import logging
import random
from collections import Counter
from dataclasses import replace

import pytest
from support.sim_cluster import Variant, run_seed
from support.sim_plan import Fault, Plan, make_plan
from support.slow import seeds

BLOCKS, PER_BLOCK = seeds(11), 10
ROOM = 4096
"""What one chunk takes in a segment."""
STORES = ("s1", "s2")


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def uneven_plan(seed: int) -> Plan:
    """The plan of a seed with two stores more, which die and are cut off, too."""
    plan, dice = make_plan(seed), random.Random(f"uneven {seed}")
    sizes = {name: ROOM * dice.choice([1, 2, 4]) for name in plan.nodes if name.startswith("d")}
    sizes |= {name: ROOM * dice.choice([3, 6, 40]) for name in STORES}
    faults = [*plan.faults]
    for name in STORES:
        at_s, other = dice.choice(plan.requests).at_s, dice.choice(plan.nodes)
        end_s = at_s + dice.choice([0.3, 1.0, 3.0])
        match dice.choice(["node", "cut", "scribble", "nothing"]):
            case "node":
                faults += [Fault(at_s, "kill_node", (name,)), Fault(end_s, "start_node", (name,))]
            case "cut":
                faults += [Fault(at_s, "cut", (other, name)), Fault(end_s, "heal", (other, name))]
            case "scribble":
                faults += [Fault(at_s + 0.1 * again, "scribble", (name,)) for again in range(8)]
    return replace(
        plan,
        segment_bytes=ROOM * dice.choice([1, 4]),
        nodes=(*plan.nodes, *STORES),
        sizes=sizes,
        faults=sorted(faults, key=lambda fault: fault.at_s),
    )


def counts_of(seed: int, plan: Plan, *, peaceful: bool) -> Counter[str]:
    plan = replace(plan, faults=[]) if peaceful else plan
    outcome = run_seed(seed, Variant(peaceful=peaceful, plan=plan))
    assert not outcome.problems, (seed, outcome.problems)
    return outcome.counts


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_beside_large_segments_every_answer_is_right(block):
    totals = Counter[str]()
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        totals += counts_of(seed, uneven_plan(seed), peaceful=False)
    assert totals["chunks_stored"] and totals["chunks_loaded"]


@pytest.mark.parametrize("seed", range(2))
def test_in_peace_nothing_is_evicted_while_a_store_has_room(seed):
    plan = uneven_plan(seed)
    roomy = replace(plan, sizes={**plan.sizes, "s1": ROOM * 400})
    counts = counts_of(seed, roomy, peaceful=True)
    assert counts["chunks_stored"] and not counts["evicted"] and not counts["declined_full"]
