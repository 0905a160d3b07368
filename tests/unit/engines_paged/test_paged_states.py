"""The statuses' prose and table agree, and what one meets in a debugger says what it is and holds."""

import asyncio
import re

import pytest
from support.engine_fakes import CHUNK, Cluster, prefill_request, prompt_of
from support.sim_loop import run_sim

from engines.paged.blocks import BlockManager
from engines.paged.documents import reuse_documents
from engines.paged.plan import Plan
from engines.paged.scheduler import Scheduler
from engines.paged.sequence import TRANSITIONS, PlacedDocument, Status, TokenSequence
from kvcore.chunk_keys import KeyChain, root_key
from kvcore.types import ChunkKey
from nodeapi.sampling import SamplingParams


def sequence():
    return TokenSequence(
        request_id="r",
        age=(1, 0),
        tokens=[1, 2, 3],
        num_prompt=3,
        chain=KeyChain(root_key(bytes(16))),
        chunk_tokens=8,
        sampling=SamplingParams(max_tokens=2),
    )


def test_the_prose_of_status_says_what_the_table_allows():
    told = re.findall(r"^ *([A-Z]+) -> ([A-Z]+): ", Status.__doc__, re.MULTILINE)
    assert len(told) == len(set(told))
    assert {(Status[a], Status[b]) for a, b in told} == {(a, b) for a, after in TRANSITIONS.items() for b in after}


@pytest.mark.parametrize("before", Status)
@pytest.mark.parametrize("after", Status)
def test_a_sequence_moves_along_the_table_only(before, after):
    moving = sequence()
    moving.status = before
    if after in TRANSITIONS[before]:
        moving.set_status(after)
        assert moving.status is after
    else:
        with pytest.raises(AssertionError, match=f"cannot become {after.name}"):
            moving.set_status(after)


def test_a_sequence_and_the_scheduler_say_where_they_are():
    scheduler = Scheduler(BlockManager(4, 4, 2), max_batch_tokens=8, max_sequences=2, max_waiting=2)
    one = sequence()
    scheduler.add(one)
    assert repr(one) == "<TokenSequence r/0 WAITING, 0/3 tokens computed, 0 blocks>"
    plan = scheduler.schedule()
    assert repr(one) == "<TokenSequence r/0 RUNNING busy, 0/3 tokens computed, 1 blocks>"
    scheduler.complete(plan)
    assert repr(scheduler) == (
        "<Scheduler 1 running, 0 waiting, 0 loading, 0 preemptions, "
        "<BlockManager 1 of 4 blocks used, 0 cached, 3 free>>"
    )


def test_an_engine_and_its_legs_say_what_they_hold():
    async def main():
        cluster = Cluster()
        async with cluster.engine("p") as engine:
            cluster.wires["p"].before["commit"] = asyncio.Event()
            task = asyncio.create_task(engine.prefill(prefill_request("r", prompt_of(2 * CHUNK + 1))))
            await cluster.wires["p"].arrived["commit"].wait()
            assert repr(engine).startswith("<EngineLoop sim serving, 1 legs, <Scheduler 0 running, 0 waiting, ")
            (leg,) = engine._legs
            assert repr(leg) == (
                "<Leg prefill r: [<TokenSequence r/0 FINISHED, 0/64 tokens computed, 0 blocks>], "
                "<LoadJob 0/2 chunks from 0 on>, <SaveJob closed, 0 chunks queued, 0 being written, 0 stored>>"
            )
            cluster.wires["p"].before["commit"].set()
            await task
        assert repr(engine).startswith("<EngineLoop sim closed, 0 legs, ")
        await cluster.aclose()

    run_sim(main, limit_s=60)


def test_a_document_that_was_not_there_at_first_is_not_reused_by_a_sequence_that_is_computed_again():
    """Its request was told that nothing is approximate."""
    blocks = BlockManager(16, 4, 2)
    one = sequence()
    one.tokens, one.num_prompt = list(range(24)), 24
    key = ChunkKey(bytes(16))
    one.documents = (PlacedDocument(8, 16, 2, 1, (key,)),)
    one.block_table = blocks.allocate(6)
    reuse_documents(one, blocks, Plan())
    assert one.num_approximate == 0 and not one.holes

    kept = blocks.allocate(2)
    blocks.seal(key, kept)  # another request has computed it
    again = Plan()
    reuse_documents(one, blocks, again)
    assert one.num_approximate == 0 and not one.holes and not again.moves
