"""The default policy over conversations, in virtual time, beside the others and beside what a perfect cache would find.

Over Mooncake's trace itself, and with more loads: `python -m benchmarks.policies`.
"""

import asyncio

import pytest
from support.sim_caches import CachingMachine, TraceLoad
from support.sim_load import Flow
from support.sim_loop import run_sim
from support.sim_trace import Figures, asked_of, run_trace, stretch_of, talks

from benchmarks.text_tree import TextTree
from kvcore.config.routing import RoutingPolicy

OTHERS = ["round_robin", "least_loaded", "text_tree"]
"""The best of the others among them; all of them are in the benchmark."""


def figures(policy: str, machine: CachingMachine, load: float, requests: int, *, seed: int, bursts: bool) -> Figures:
    rows = talks(seed, requests)
    asked = asked_of(rows, stretch_of(rows, machine, load), bursts=bursts)
    if policy != "text_tree":
        return run_trace(asked, machine, policy=RoutingPolicy(policy))[0]
    tree = TextTree()
    made = lambda: TraceLoad(machine, policy=tree.make(), on_sent=tree.sent, on_ended=tree.ended)  # noqa: E731
    return run_trace(asked, machine, made)[0]


@pytest.mark.parametrize("plain", [False, True])
def test_what_is_cached_somewhere_is_used(plain: bool) -> None:
    machine = CachingMachine(2, 2, plain=plain)
    found = figures("prefix_aware", machine, 0.2, 50, seed=1, bursts=False)
    assert found.of_ideal >= 0.93 and found.hit_rate > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("plain, size, load, requests", [(True, 4, 0.32, 400), (False, 2, 0.6, 250)])
def test_no_other_policy_is_better(plain: bool, size: int, load: float, requests: int) -> None:
    """Where servers have each a cache of their own it answers much more in time than round robin."""
    machine = CachingMachine(size, size, plain=plain)
    mine = figures("prefix_aware", machine, load, requests, seed=1, bursts=False)
    others = {policy: figures(policy, machine, load, requests, seed=1, bursts=False) for policy in OTHERS}
    assert mine.of_ideal >= 0.95
    assert mine.goodput >= 0.97 * max(other.goodput for other in others.values()), (mine, others)
    assert mine.ttft_p99_s <= 1.15 * min(other.ttft_p99_s for other in others.values()), (mine, others)
    if plain:
        assert mine.goodput >= 1.5 * others["round_robin"].goodput, (mine, others)


@pytest.mark.parametrize("together", [1, 3])
def test_prompts_that_begin_alike_go_to_one_server_before_it_has_computed_any(together: int) -> None:
    async def main() -> None:
        load = TraceLoad(CachingMachine(4, 4, plain=True))
        await load.prober.probe()
        shared = [5] * 8000
        await asyncio.gather(*(load.send(Flow(0), [*shared, *[number] * 100]) for number in range(together)))
        assert len({record.legs[0].node for record in load.log.newest()}) == 1
        await load.send(Flow(0), [*shared, *[9] * 100])
        assert len({record.legs[0].node for record in load.log.newest()}) == 1

    run_sim(main)


def test_a_plain_server_finds_what_the_prompt_before_has_computed() -> None:
    """And not only what was there when the prompt came, which would make waiting at the right server worthless."""

    async def main() -> None:
        load = TraceLoad(CachingMachine(1, 1, plain=True))
        await load.prober.probe()
        await asyncio.gather(*(load.send(Flow(0), [*[5] * 8000, number]) for number in range(2)))
        prefills = [leg for record in load.log.newest() for leg in record.legs if leg.kind == "prefill"]
        assert sorted(leg.computed_tokens or 0 for leg in prefills) == [8001 - 31 * 256, 8001]

    run_sim(main)


def test_a_decoder_that_waits_for_a_prompt_does_not_count_as_one_that_has_it() -> None:
    """Else it computes the next one that begins alike all by itself."""

    async def main() -> None:
        load = TraceLoad(CachingMachine(2, 1, plain=True))
        await load.prober.probe()
        await asyncio.gather(*(load.send(Flow(0), [*[5] * 8000, number]) for number in range(3)))
        decodes = [leg for record in load.log.newest() for leg in record.legs if leg.kind == "decode"]
        assert len(decodes) == 3 and all((leg.computed_tokens or 0) < 300 for leg in decodes)

    run_sim(main)
