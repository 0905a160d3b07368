"""Somebody owns one node's network, and not the cluster's secret: every request gets the right text all the same."""

import logging
import random
from collections import Counter
from dataclasses import replace

import pytest
from support.chunk_attacks import CLUSTER
from support.sim_cluster import Variant, run_seed
from support.sim_plan import make_plan
from support.slow import seeds, slow_but

from kvcore.trust.opening import OPEN, ClusterTrust
from kvstore.integrity.checks import Integrity

QUICK = range(1, 2)
BLOCKS = [range(first, first + 20) for first in range(2, 2 + 20 * seeds(10), 20)]
DEEDS = [
    ("drop", "late", "change", "other_proof", "answer", "replay"),
    ("cut", "change_reply", "other_reply", "other_status", "without_digest"),
    ("lose_frame", "twice", "change_frame", "other_frame", "own_frame"),
    ("data_change", "data_other", "data_forged", "redirected"),
]
"""With requests, answers, frames of streams, transfers."""


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def owned(seed: int, trust: ClusterTrust, integrity: Integrity) -> Variant:
    """Two tenants ask the same. Nothing else fails: who is not answered was kept from it by the network's owner."""
    plan = make_plan(seed)
    requests = [replace(wanted, salt=(b"one", b"two")[n % 2]) for n, wanted in enumerate(plan.requests[:8])]
    victim = ("d1", "p1", "d2", "p2")[seed % 4]
    calm = replace(plan, requests=requests, faults=[])
    return Variant(trust=trust, owned=victim, integrity=integrity, peaceful=True, plan=calm)


def secured(seed: int) -> Variant:
    """Half of them encrypt, whichever node it owns."""
    draw = random.Random(f"nonces {seed}").randbytes
    sealed = Integrity("mac", CLUSTER, draw, encrypt=bool(seed & 4))
    return owned(seed, ClusterTrust("sim", CLUSTER), sealed)


@pytest.mark.parametrize("block", slow_but([QUICK], [QUICK, *BLOCKS]))
def test_with_a_secret_every_request_gets_the_right_text(block):
    counts = Counter[str]()
    for seed in block:
        outcome = run_seed(seed, secured(seed))
        assert not outcome.problems, f"seed {seed}\n" + "\n".join(outcome.problems)
        assert not outcome.counts["failed"], f"seed {seed}\n" + "\n".join(outcome.lines[-40:])
        counts.update(outcome.counts)
    if len(block) > 1:
        done = [{deed for deed in deeds if counts[f"owner_{deed}"]} for deeds in DEEDS]
        assert all(len(some) > 1 for some in done), (done, counts)
        assert counts["unproven"] and counts["greeting_refused"] and counts["injected"]


def test_without_a_secret_it_has_its_answers():
    assert any("is wrong" in problem for problem in run_seed(8, owned(8, OPEN, Integrity())).problems)
