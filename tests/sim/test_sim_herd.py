"""Many requests at once for one prompt or one long prefix, in virtual time: computed once, whoever dies meanwhile."""

import logging
import random

import pytest
from support.sim_cluster import Variant, run_seed
from support.sim_herd import COMPUTE_S, DOCUMENT, RATE, Herd, K
from support.sim_plan import CHUNK
from support.slow import seeds, slow_but

from engines.jobs.context import JobLimits

FOLLOW_S = JobLimits().follow_s
SETS = seeds(15)
"""Of ten seeds each."""
NODES = {
    "1P1D": ("p1", "d1"),
    "2P2D": ("p1", "p2", "d1", "d2"),
    "4P1D": ("p1", "p2", "p3", "p4", "d1"),
    "2D": ("d1", "d2"),
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def run(herd: Herd, seed: int, *, peaceful: bool = True):
    outcome = run_seed(seed, Variant(peaceful=peaceful, plan=herd.plan(seed)))
    assert not outcome.problems, (herd, outcome.problems)
    return outcome.counts


@pytest.mark.parametrize("count", slow_but([8], [2, 8, 16]))
@pytest.mark.parametrize("nodes", NODES)
def test_one_prompt_is_computed_once_over_the_whole_cluster(nodes, count):
    herd = Herd(nodes=NODES[nodes], count=count)
    counts = run(herd, 1)
    assert counts["prefill_tokens"] == herd.prefix_tokens - 1, "all but the last token, which each answer begins with"
    assert counts["slowest_ms"] < 1000 * (COMPUTE_S + 0.2), "nobody waits longer than one alone"


def test_behind_one_prefix_each_computes_its_own():
    herd = Herd(own_tokens=70)
    counts = run(herd, 1)
    shared = (herd.prefix_tokens - 1, herd.prefix_tokens)  # the prefix ends one token behind a chunk
    assert shared[0] + 8 * 70 <= counts["prefill_tokens"] <= shared[1] + 8 * 70
    assert counts["slowest_ms"] < 1000 * (COMPUTE_S + 8 * 70 / RATE)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(SETS))
def test_when_the_computing_node_dies_another_takes_over(part):
    killed = 0
    for seed in range(part * 10, part * 10 + 10):
        dice = random.Random(seed)
        at_s = dice.uniform(0.0, 1.2)
        herd = Herd(
            nodes=dice.choice([NODES["2P2D"], NODES["4P1D"]]),
            count=dice.choice([2, 4, 8, 16]),
            own_tokens=dice.choice([0, 0, 40]),
            spread_s=dice.choice([0.0, 0.3]),
            kill_s=at_s,
            kills=dice.choice(["node", "engine"]),
        )
        peaceful = dice.random() < 0.7
        counts = run(herd, seed, peaceful=peaceful)
        killed += counts["killed"]
        own = herd.count * herd.own_tokens
        if peaceful:  # else a lost message may cost a request its patience
            assert counts["prefill_tokens"] <= 2 * herd.prefix_tokens + 2 * own, (seed, herd)
            longest_s = herd.spread_s + at_s + FOLLOW_S + 2 * (COMPUTE_S + own / RATE) + 0.5
            assert counts["slowest_ms"] < 1000 * longest_s, (seed, herd)
    assert killed >= 5


def documents_herd(nodes, **more) -> Herd:
    return Herd(nodes=NODES[nodes], prefix_tokens=2 * CHUNK + 1, own_tokens=10, documents=3, **more)


@pytest.mark.parametrize("count", slow_but([8], [2, 8]))
@pytest.mark.parametrize("nodes", NODES)
def test_documents_that_many_name_at_once_are_computed_once_over_the_whole_cluster(nodes, count):
    herd = documents_herd(nodes, count=count)
    counts = run(herd, 1)
    own = count * (herd.own_tokens + 3 * (K + 1))
    once = 3 * (DOCUMENT + 1), 2 * CHUNK
    """Each document behind the header's last token, and the header's full chunks."""
    assert counts["prefill_tokens"] - own - once[0] in ((once[1], 2 * once[1]) if nodes == "2D" else (once[1],))
    assert counts["slowest_ms"] < 1000 * ((sum(once) + own + herd.prefix_tokens) / RATE + 0.2)


@pytest.mark.parametrize("kills", ["node", "engine"])
@pytest.mark.parametrize("kill_s", slow_but([0.1], [0.1, 0.45]))
def test_when_the_node_that_computes_documents_dies_another_takes_over(kills, kill_s):
    herd = documents_herd("2P2D", count=4, kills=kills, kill_s=kill_s)
    counts = run(herd, 1)
    own = herd.count * (herd.own_tokens + 3 * (K + 1))
    assert counts["killed"] == 1
    assert counts["prefill_tokens"] <= 2 * (3 * (DOCUMENT + 1) + herd.prefix_tokens + own)
    assert counts["slowest_ms"] < 1000 * (kill_s + JobLimits().follow_document_s + counts["prefill_tokens"] / RATE)
