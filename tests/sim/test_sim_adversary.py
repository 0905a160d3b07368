"""Somebody without the secret changes chunks in segments and tiers while the cluster serves: no wrong byte is taken."""

import logging
import random
from collections import Counter

import pytest
from support.chunk_attacks import ATTACKS, CLUSTER
from support.sim_cluster import Variant, run_seed
from support.sim_tier_plan import make_tier_plan
from support.slow import seeds, slow_but

from kvstore.integrity.checks import Integrity

QUICK = range(2, 4)
BLOCKS = [range(first, first + 10) for first in range(4, 4 + 10 * seeds(20), 10)]


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def hostile(seed: int, integrity: Integrity) -> Variant:
    """Every second seed has tiers."""
    return Variant(integrity=integrity, adversary=True, plan=make_tier_plan(seed) if seed % 2 else None)


def sealed(seed: int) -> Integrity:
    """Every second one encrypts, of those with and without tiers."""
    encrypt = bool((seed ^ seed // 2) & 1)
    return Integrity("mac", CLUSTER, random.Random(f"nonces {seed}").randbytes, encrypt=encrypt)


@pytest.mark.parametrize("block", slow_but([QUICK], [QUICK, *BLOCKS]))
def test_with_macs_or_encrypted_no_answer_is_wrong_whatever_it_writes(block):
    counts = Counter[str]()
    for seed in block:
        outcome = run_seed(seed, hostile(seed, sealed(seed)))
        assert not outcome.problems, f"seed {seed}\n" + "\n".join(outcome.problems)
        counts.update(outcome.counts)
    happened = [f"attack_{name}" for name in ATTACKS] + ["chunks_loaded", "quarantined_forged", "quarantined_unproven"]
    assert not [name for name in happened if not counts[name]], counts


def test_with_checksums_it_has_its_tokens_answered():
    found = (problem for seed in range(3, 9) for problem in run_seed(seed, hostile(seed, Integrity())).problems)
    assert any("is wrong" in problem for problem in found)
