"""Tiers under faults, seed by seed, in virtual time: chunks are lost, damaged, late, and nodes die while they move."""

import logging
from collections import Counter

import pytest
from support.sim_cluster import Variant, run_seed
from support.sim_tier_plan import make_tier_plan
from support.slow import seeds, slow_but

from kvnode.tiers.filler import TierFiller
from kvnode.tiers.own_segment import OwnSegment
from kvstore.integrity.checks import Integrity
from kvstore.tiers.guarded import GuardedTier
from kvstore.types import GetOutcome

BLOCKS, PER_BLOCK = seeds(30), 10
QUICK_BLOCKS = 1


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def totals():
    """What happened in all seeds that ran in this process."""
    return Counter()


def simulate(seed: int, *, peaceful: bool, faults: bool = True):
    """`peaceful`: nothing fails but tiers and machines. Whatever is wrong fails the test and names the seed."""
    outcome = run_seed(seed, Variant(peaceful=peaceful, plan=make_tier_plan(seed, faults=faults)))
    assert not outcome.problems, (seed, peaceful, outcome.problems)
    return outcome


@pytest.mark.parametrize("block", slow_but(range(QUICK_BLOCKS), range(BLOCKS)))
def test_no_answer_is_wrong_nothing_is_left_and_every_tier_is_used_again(block, totals):
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        counts = simulate(seed, peaceful=seed % 2 == 0).counts
        totals.update(counts)
        totals["seeds_with_hits"] += counts["tier_promoted"] > 0


@pytest.mark.slow
def test_faults_did_happen_and_tiers_were_of_use(totals):
    if totals["accepted"] < (BLOCKS - QUICK_BLOCKS) * PER_BLOCK * 10:
        pytest.skip("needs all slow blocks in the same process")
    happened = [
        *("saved", "there", "dropped", "gone", "failed", "promoted", "damaged", "missing", "computed", "no_room"),
        *("warmed", "chunks_lost", "chunks_damaged"),
    ]
    assert not [name for name in happened if not totals[f"tier_{name}"]], totals
    assert totals["killed_in_move"] and totals["cut_in_promote"] and totals["promoted_by_peers"], totals
    assert totals["seeds_with_hits"] > BLOCKS * PER_BLOCK // 4, totals
    assert totals["failed"] <= totals["accepted"] // 200, "requests are saved from faults, but for very few"


@pytest.mark.parametrize("seed", range(500, 504))
def test_without_faults_no_room_is_left_to_expire_and_no_lease(seed):
    counts = simulate(seed, peaceful=True, faults=False).counts
    assert not counts["expired"] and not counts["leases_expired"] and not counts["failed"]
    assert not counts["tier_damaged"] or make_tier_plan(seed, faults=False).tiers.rot


def test_a_seed_is_the_same_each_time():
    first, again = simulate(7, peaceful=False), simulate(7, peaceful=False)
    assert first.lines == again.lines and first.digest == again.digest


# --- what it finds: production code with a fault put in ---


async def _nothing(*_args, **_kwargs):
    pass


def without_verification(patch):
    patch.setattr(Integrity, "check", lambda *_: GetOutcome.OK)


def with_bytes_that_stay_under_way(patch):
    patch.setattr(GuardedTier, "_leave", _nothing)


def with_a_try_that_never_ends(patch):
    whole = GuardedTier._end

    def end(self, ok):
        whole(self, ok)
        self._trying = self._failures >= self._limits.failures

    patch.setattr(GuardedTier, "_end", end)


def with_pauses_that_grow_for_ever(patch):
    whole = GuardedTier._end

    def end(self, ok):
        whole(self, ok)
        if self._closed_until > 0:
            self._closed_until += 30

    patch.setattr(GuardedTier, "_end", end)


def with_a_filler_that_saves_half(patch):
    whole = TierFiller._enqueue

    def enqueue(self, lane, keys):
        whole(self, lane, [key for key in keys if key[0] % 2])

    patch.setattr(TierFiller, "_enqueue", enqueue)


def with_room_that_is_not_given_back(patch):
    patch.setattr(OwnSegment, "give_back", _nothing)


def with_leases_that_are_not_given_back(patch):
    patch.setattr(OwnSegment, "release", _nothing)


FOUND = [
    (without_verification, "quarantined_checksum", 28),
    (with_bytes_that_stay_under_way, "bytes under way", 0),
    (with_a_try_that_never_ends, "a try of", 5),
    (with_pauses_that_grow_for_ever, "not used by", 5),
    (with_a_filler_that_saves_half, "are not in", 6),
]
"""What must be said of one of the first seeds from a number on; those before say nothing, to save time."""


@pytest.mark.parametrize(("fault", "what", "first"), FOUND, ids=lambda value: getattr(value, "__name__", None))
def test_it_finds(fault, what, first, monkeypatch):
    fault(monkeypatch)
    plans = ((seed, make_tier_plan(seed)) for seed in range(first, first + 40))
    found = (run_seed(seed, Variant(peaceful=seed % 2 == 0, plan=plan)).problems for seed, plan in plans)
    assert any(what in problem for problems in found for problem in problems)


@pytest.mark.parametrize(
    ("fault", "what"),
    [(with_room_that_is_not_given_back, "expired"), (with_leases_that_are_not_given_back, "leases_expired")],
)
def test_it_finds_what_is_left_to_expire(fault, what, monkeypatch):
    fault(monkeypatch)
    plans = ((seed, make_tier_plan(seed, faults=False)) for seed in range(507, 520))
    assert any(run_seed(seed, Variant(peaceful=True, plan=plan)).counts[what] for seed, plan in plans)
