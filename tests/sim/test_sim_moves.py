"""Nodes are emptied and segments evened out under load, while nodes, engines and the metadata server die in the middle.

No answer is wrong, nothing stays held, and what the index has lies where it says.
"""

import logging
from collections import Counter

import pytest
from support.sim_cluster import Variant, run_seed
from support.sim_moves import moving_plan

from kvnode.moving import ChunkMover

BLOCKS, PER_BLOCK = 4, 8


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def counts_of(seed: int, *, wild: bool) -> Counter[str]:
    outcome = run_seed(seed, Variant(peaceful=not wild, plan=moving_plan(seed, wild=wild), moves=True))
    assert not outcome.problems, (seed, outcome.problems)
    counts = outcome.counts
    if not wild and not counts["kill_metadata"]:  # else what was being written may have been taken for whole
        assert not counts["at_rest_checksum"] + counts["chunk_miss_checksum"], f"seed {seed}: copies are damaged"
    return counts


def test_chunks_are_moved_while_requests_come_and_machines_die():
    totals = Counter[str]()
    for seed in range(2):
        totals += counts_of(seed, wild=seed % 2 == 1)
    assert totals["moved"] > 3 and totals["drain"] and totals["rebalance"]


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_byte_is_wrong_and_nothing_is_held_after_moves_under_faults(block):
    totals = Counter[str]()
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        for wild in (False, True):
            totals += counts_of(seed, wild=wild)
    happened = ["moved", "drain", "rebalance", "kill_node", "kill_engine", "kill_metadata", "chunks_loaded"]
    assert all(totals[name] for name in happened), totals


def test_it_finds_copies_that_are_made_visible_without_their_checksum(monkeypatch):
    async def hasty(mover, transfer, reply, write_by):
        segments = {segment.id: segment for segment in reply.segments}
        copies = [mover._copy_of(move, segments[move.target.segment_id]) for move in reply.moves]
        copies = [copy for copy in copies if copy is not None]
        return await mover._send(transfer, copies, [copy.op(0, payload=True) for copy in copies], write_by)

    monkeypatch.setattr(ChunkMover, "_write", hasty)
    with pytest.raises(AssertionError, match="damaged"):
        for seed in range(4):
            counts_of(seed, wild=False)
