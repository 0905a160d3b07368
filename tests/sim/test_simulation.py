"""The production cluster under faults, seed by seed, in virtual time. `python -m tests.sim.run SEED` replays one."""

import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.sim_cluster import Variant, run_seed
from support.sim_nodes import DataFaults
from support.slow import seeds, slow_but

from kvstore.integrity.checks import Integrity
from metadata_server.index.reading import Reading
from metadata_server.index.state import MetadataState
from router.requests import legs as router_legs

BLOCKS, PER_BLOCK = seeds(10), 20
QUICK_BLOCKS = 1
"""Of BLOCKS: those of `make check`. The others are slow."""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def totals():
    """What happened in all seeds that ran in this process."""
    return Counter()


def simulate(seed: int, variant: Variant | None = None):
    """As `run_seed`; whatever is wrong fails the test and names the seed."""
    try:
        outcome = run_seed(seed, variant)
    except Exception as error:
        error.add_note(f"replay it: python -m tests.sim.run {seed}")
        raise
    assert not outcome.problems, f"replay it: python -m tests.sim.run {seed}\n" + "\n".join(outcome.problems)
    return outcome


@pytest.mark.parametrize("block", slow_but(range(QUICK_BLOCKS), range(BLOCKS)))
def test_no_answer_is_wrong_and_nothing_is_left_over(block, totals):
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        totals.update(simulate(seed).counts)


@pytest.mark.parametrize("blocks", slow_but([QUICK_BLOCKS], [QUICK_BLOCKS, BLOCKS - QUICK_BLOCKS]))
def test_faults_did_happen_and_were_survived(blocks, totals):
    if totals["accepted"] < blocks * PER_BLOCK * 10:
        pytest.skip(f"needs all {blocks} blocks, the quick or the slow ones, in the same process")
    happened = [
        *("kill_node", "kill_engine", "kill_metadata", "cut", "lost", "late", "reset", "repeated", "retries"),
        *("data_failed", "data_torn", "data_late", "data_flipped", "data_cut"),
        *("chunks_loaded", "chunk_miss_absent", "chunk_miss_checksum", "chunk_miss_unreachable", "writes_failed"),
        *("quarantined_checksum", "quarantined_unreachable", "at_rest_ok", "at_rest_checksum", "imported"),
        *("evicted", "expired", "leases_expired", "declined_full", "preemptions", "index_resets"),
        *(("commit_refused", "given_up") if blocks > QUICK_BLOCKS else ()),  # in one seed of thirty
    ]
    assert not [name for name in happened if not totals[name]], totals
    assert totals["failed"] <= totals["accepted"] // 100, "requests are saved from faults, but for very few"


@pytest.mark.parametrize("seed", slow_but(range(500, 502), range(500, 506)))
def test_in_peace_nothing_is_tried_twice_or_waited_for(seed):
    counts = simulate(seed, Variant(peaceful=True)).counts
    happened = ["retries", "failed", "refused", "late", "silent", "lost", "reset", "save_failed", "at_rest_checksum"]
    assert not [name for name in happened if counts[name]], counts
    assert counts["chunks_loaded"] > 0
    assert counts["slowest_ms"] < 1500, "nobody waits for a deadline"


def test_a_seed_is_the_same_each_time_and_in_each_process():
    first, again = simulate(7), simulate(7)
    assert first.lines == again.lines
    assert first.digest == again.digest
    command = [sys.executable, "-m", "tests.sim.run", "7", "-q"]
    env = {"PYTHONHASHSEED": "12345", "PATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert first.digest in done.stdout
    assert simulate(8).digest != first.digest


def problems(seeds: range, variant: Variant | None = None) -> Iterator[str]:
    """All that is wrong with any of the seeds, each run once it is asked for."""
    return (problem for seed in seeds for problem in run_seed(seed, variant).problems)


def test_it_finds_a_store_that_does_not_verify():
    broken = Variant(integrity=Integrity("header"), data=DataFaults(flip=0.5))
    assert any("is wrong" in problem for problem in problems(range(5), broken))


def test_it_finds_a_router_that_forgets_what_was_sent(monkeypatch):
    whole = router_legs.RequestLegs._generate_request

    def forgetful(self, *told):
        return msgspec.structs.replace(whole(self, *told), output_token_ids=[])

    monkeypatch.setattr(router_legs.RequestLegs, "_generate_request", forgetful)
    assert any("is wrong" in problem for problem in problems(range(12)))


def test_it_finds_leases_that_never_end(monkeypatch):
    monkeypatch.setattr(MetadataState, "release", lambda *_: None)
    monkeypatch.setattr(Reading, "_grant", _never_ends)
    assert any("read_leases" in problem for problem in problems(range(2)))


def _never_ends(reading, replicas, *_, **__):
    return reading.leases.grant(replicas, None)
