"""Documents over a whole simulated cluster: reused in other orders and on other nodes, while decoders die, for long."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
from support.sim_cluster import SimCluster, Variant, run_seed
from support.sim_documents import documents_plan
from support.sim_loop import SimSeedLoop, run_sim
from support.sim_plan import Plan


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def played(plan: Plan, seed: int = 1) -> SimCluster:
    """The cluster when all is over."""
    loop, clusters = SimSeedLoop(seed, 600.0), list[SimCluster]()

    async def main() -> object:
        clusters.append(SimCluster(seed, loop, Variant(peaceful=True, plan=plan)))
        outcome = await clusters[0].run()
        assert not outcome.problems, outcome.problems
        return outcome

    run_sim(main, loop=loop)
    return clusters[0]


def test_documents_are_reused_in_other_orders_and_on_other_nodes_and_plain_prompts_are_what_they_were():
    plan = documents_plan(1)
    cluster = played(plan)
    records = {record.id: record for record in cluster.log.newest()}
    named = [wanted for wanted in plan.requests if wanted.documents is not None]
    assert sum(records[one.id].approximate_tokens > 0 for one in named) > len(named) // 2
    assert {leg.node for one in named for leg in records[one.id].legs if leg.approximate_tokens} == {"d1", "d2"}
    plain = [wanted for wanted in plan.requests if wanted.documents is None]
    assert plain and all(records[one.id].approximate_tokens == 0 for one in plain)
    answers = {answer.wanted.id: answer.tokens for answer in cluster.answers}
    for one in plain:
        assert answers[one.id] == cluster.oracle.expected(one, plan.engine), "to the bit, beside all that reuse"
    exact = [one for one in named if answers[one.id] == cluster.oracle.expected(one, plan.engine)]
    assert len(exact) < len(named), "else nothing was approximate"


def test_with_the_gate_shut_everything_is_as_without_documents():
    shut = documents_plan(2, why="kv.blend.mode is off")
    without = replace(shut, requests=[replace(one, documents=None) for one in shut.requests])
    first, second = (run_seed(2, Variant(peaceful=True, plan=plan)) for plan in (shut, without))
    assert not first.problems and (first.digest, first.counts) == (second.digest, second.counts)


def test_decoders_die_in_the_middle_of_answers_that_reuse_documents():
    outcome = run_seed(3, Variant(peaceful=True, plan=documents_plan(3, faults=True)))
    assert not outcome.problems, outcome.problems
    assert outcome.counts["retries"] and outcome.counts["approximate_tokens"] and not outcome.counts["failed"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 16))
def test_whatever_dies_answers_are_explained_and_chunks_are_what_their_names_say(seed):
    outcome = run_seed(seed, Variant(plan=documents_plan(seed, faults=True)))
    assert not outcome.problems, (seed, outcome.problems)


@pytest.mark.slow
def test_three_hundred_new_questions_over_thirty_documents_reuse_as_much_in_the_end_as_ever():
    """What is blended goes under no key, so it pushes out nothing: segments have room for the documents alone."""
    plan = documents_plan(5, requests=300, texts=30, apart_s=0.15, plain=0.0, segment_bytes=4096 * 60)
    cluster = played(plan)
    records = {record.id: record for record in cluster.log.newest()}
    shares = list[float]()
    for wanted in plan.requests:
        assert wanted.documents is not None
        reusable = sum(stop - start - 4 for start, stop in wanted.documents.spans[1:])
        shares.append(records[wanted.id].approximate_tokens / reusable)
    by_hundred = [sum(shares[first : first + 100]) / 100 for first in (0, 100, 200)]
    computed = Counter[int]()
    for number, wanted in enumerate(plan.requests):
        computed[number // 100] += sum(leg.prepared_tokens or 0 for leg in records[wanted.id].legs)
        computed[number // 100] += sum(
            leg.computed_tokens or 0 for leg in records[wanted.id].legs if leg.kind == "prefill"
        )
    assert min(by_hundred) > 0.9, by_hundred
    assert computed[2] <= computed[1] <= computed[0], computed
    assert computed[2] < 0.05 * sum(len(wanted.prompt) for wanted in plan.requests[200:]), computed
