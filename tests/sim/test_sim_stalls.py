"""Engines that hang behind healthy nodes, in virtual time: streams go on elsewhere within seconds, and it costs few."""

import logging
import random
from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from support.sim_cluster import Outcome, Variant, run_seed
from support.sim_plan import Fault, Plan, make_plan
from support.slow import seeds, slow_but

from kvcore.config.schema import RouterConfig

STRETCH = 4
"""Requests come within 10 s, not 2.5."""
ROUTER = RouterConfig(min_prefill_tokens=8, request_timeout_s=60.0)
"""All other times are as they are by default."""
MORE_S = 1.0
"""To look, to move, to wait for a turn, and to compute what the other node lacks."""
UNKNOWN_S = 1.0
"""For the tokens of a prompt, of a node that has not shown how fast it is."""


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def plan(seed: int, names: str, for_s: float, nodes: tuple[str, ...] = ("p1", "p2", "d1", "d2")) -> Plan:
    """These nodes' engines hang in the middle of a request, for so long."""
    dice = random.Random(f"stall {seed}")
    usual = make_plan(seed)
    requests = [replace(one, at_s=one.at_s * STRETCH, leaves_after=None) for one in usual.requests]
    at_s = dice.choice(requests).at_s + 0.02 + 0.1 * dice.random()
    faults = [Fault(at_s, "hang", (name,)) for name in names.split()]
    faults += [Fault(at_s + for_s, "wake", (name,)) for name in names.split()]
    engine = msgspec.structs.replace(usual.engine, num_blocks=200, max_sequences=16)
    return replace(usual, engine=engine, requests=requests, faults=faults, nodes=nodes)


def simulate(seed: int, planned: Plan) -> Outcome:
    outcome = run_seed(seed, Variant(peaceful=True, plan=planned, router=ROUTER, waits=True))
    assert not outcome.problems, (seed, outcome.problems)
    assert outcome.counts["failed"] == outcome.counts["refused"] == 0, (seed, outcome.counts)
    return outcome


def silences(outcome: Outcome) -> tuple[float, float]:
    """(The longest wait for a first token, the longest gap after one), over all requests."""
    first, gap, last = 0.0, 0.0, dict[str, tuple[float, bool]]()
    for line in outcome.lines:
        at, what, *facts = line.split()
        if what == "accepted":
            last[facts[0]] = float(at), False
        elif what == "emit":
            before, begun = last[facts[0]]
            if begun:
                gap = max(gap, float(at) - before)
            else:
                first = max(first, float(at) - before)
            last[facts[0]] = float(at), True
    return first, gap


def stalls(outcome: Outcome) -> tuple[set[str], set[str]]:
    """(Requests of which a leg stalled, requests that came when that node was known for it.)"""
    lines = [line.split() for line in outcome.lines]
    known = min((float(at) for at, what, *_ in lines if what == "suspected"), default=None)
    awake = next(float(at) for at, what, *_ in lines if what == "wake")
    came = {facts[0]: float(at) for at, what, *facts in lines if what == "accepted"}
    stalled = {facts[0] for _, what, *facts in lines if what == "stalled"}
    return stalled, {name for name, at_s in came.items() if known and known < at_s < awake}


@pytest.mark.parametrize("block", slow_but([range(4)], [range(4), range(4, 4 + seeds(56))]))
@pytest.mark.parametrize("name", ["d1", "p1"])
def test_a_hung_engine_holds_nobody_for_longer_than_the_limits(name, block):
    totals: Counter[str] = Counter()
    for seed in block:
        planned = plan(seed, name, 12.0)
        outcome = simulate(seed, planned)
        first, gap = silences(outcome)
        assert gap <= ROUTER.stall_gap_s + MORE_S, (seed, gap)
        assert first <= ROUTER.stall_first_s + UNKNOWN_S + MORE_S, (seed, first)
        stalled, late = stalls(outcome)
        assert not stalled & late, (seed, "a node that is known to hang was asked again")
        totals.update(outcome.counts, late=len(late))
    # decoders wait for a prefiller hardly longer than it takes to compute: few legs are left that can stall
    least = len(block) // 2 if name == "d1" else 1
    assert totals["stalled"] >= least and totals["late"], totals


def legs(outcome: Outcome) -> float:
    """Decode legs for each request."""
    return outcome.counts["legs_decode"] / outcome.counts["accepted"]


@pytest.mark.parametrize("block", slow_but([range(3)], [range(3), range(3, 3 + seeds(37))]))
def test_where_all_are_slow_requests_wait_and_are_not_sent_to_and_fro(block):
    """Both decoders and both prefillers hang; nobody is there to take anything over."""
    for seed in block:
        outcome = simulate(seed, plan(seed, "p1 p2 d1 d2", 9.0))
        assert silences(outcome)[1] <= 9.0 + MORE_S, seed
        assert legs(outcome) <= 3.0, (seed, legs(outcome))


@pytest.mark.parametrize("block", slow_but([range(3)], [range(3), range(3, 3 + seeds(37))]))
def test_alone_a_hung_node_is_waited_for(block):
    totals: Counter[str] = Counter()
    for seed in block:
        outcome = simulate(seed, plan(seed, "d1", 6.0, ("d1",)))
        first, gap = silences(outcome)
        assert max(first, gap) <= 6.0 + 2 * MORE_S, (seed, first, gap)
        totals.update(outcome.counts)
    assert totals["suspected"] and totals["stalled"] == 0, totals
    assert totals["waits"], "requests came while it was suspected, and were not refused"
