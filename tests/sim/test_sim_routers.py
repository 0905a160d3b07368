"""Several routers over the same nodes in virtual time: they share turns, places and work on the nodes."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from support.sim_load import Flow, Machine, Seen, outcomes, p99, run_load
from support.sim_loop import run_sim
from support.sim_routers import Routers
from test_sim_admission import FOUR, FULL, TWO, WITHIN, capacity


def by_routers(
    machine: Machine, flows: Sequence[Sequence[Flow]], seed: int, *, shares: bool = True, cut: bool = False
) -> list[list[Seen]]:
    async def main() -> list[list[Seen]]:
        routers = Routers(machine, len(flows), shares)
        routers.cut = cut
        return await routers.drive(flows, seed)

    return run_sim(main, limit_s=10_000.0)


def tokens_of(seen: Sequence[Seen], user: str) -> int:
    """Of prompts that were answered."""
    return sum(one.tokens for one in seen if one.user == user and one.error is None)


@pytest.mark.slow
def test_who_asks_for_too_much_at_one_router_and_at_another_get_the_same():
    rate = capacity(TWO)
    a, b = by_routers(TWO, [[Flow(rate, "A", 8.0)], [Flow(3 * rate, "B", 8.0)]], 3)
    assert 0.8 < tokens_of(a, "A") / tokens_of(b, "B") < 1.25
    assert outcomes(a + b)["rate_limit_exceeded"] > 10


@pytest.mark.slow
def test_the_share_is_of_flows_and_not_of_routers():
    """Three of four go through one router."""
    flow = Flow(0.8 * capacity(TWO), until_s=10.0)
    names = ("A", "B", "C")
    many, one = by_routers(TWO, [[replace(flow, user=name) for name in names], [replace(flow, user="D")]], 1)
    got = {name: tokens_of(many, name) for name in names} | {"D": tokens_of(one, "D")}
    assert max(got.values()) < 1.4 * min(got.values()), got
    apart = by_routers(TWO, [[replace(flow, user=name) for name in names], [replace(flow, user="D")]], 1, shares=False)
    assert tokens_of(apart[1], "D") > 1.6 * tokens_of(apart[0], "A"), "by itself each router takes half"


@pytest.mark.slow
def test_one_flow_through_two_routers_has_one_share():
    flow = Flow(0.8 * capacity(TWO), "A", until_s=10.0)
    first, second = by_routers(TWO, [[flow, replace(flow, user="B")], [flow]], 1)
    of_a = tokens_of(first, "A") + tokens_of(second, "A")
    assert 0.7 < of_a / tokens_of(first, "B") < 1.4


@pytest.mark.slow
def test_who_has_priority_at_one_router_goes_before_all_at_the_other():
    rate = capacity(TWO)
    low, high = by_routers(TWO, [[Flow(2 * rate, "low", 5.0, rank=2)], [Flow(0.5 * rate, "high", 5.0, rank=0)]], 1)
    assert outcomes(high)["ok"] >= 0.95 * len(high)
    assert outcomes(low)["rate_limit_exceeded"] > 15
    assert sorted(one.ttft_s or 0.0 for one in high)[len(high) // 2] < 0.6


@pytest.mark.slow
def test_a_light_flow_takes_its_places_though_another_router_has_filled_them_all():
    rate = capacity(FULL, 40)
    b = Flow(0.2 * rate, "B", 10.0, max_tokens=40)
    flows = [[Flow(1.6 * rate, "A", 10.0, max_tokens=40)], [b]]
    _, apart = by_routers(FULL, flows, 1, shares=False)
    assert any(one.error for one in apart)
    for cut in (False, True):  # cut off from the other router it counts on its own part
        _, mine = by_routers(FULL, flows, 1, cut=cut)
        assert not any(one.error for one in mine)
        assert p99(mine, "B") < p99(apart, "B")


@pytest.mark.slow
def test_routers_that_do_not_hear_each_other_have_half_each():
    rate = capacity(FULL, 40)
    flows = [[Flow(1.6 * rate, name, 10.0, max_tokens=40)] for name in "AB"]
    a, b = by_routers(FULL, flows, 1, cut=True)
    assert 0.75 < tokens_of(a, "A") / tokens_of(b, "B") < 1.33


@pytest.mark.slow
def test_a_router_that_is_alone_again_takes_everything():
    """The other one has died: nothing of it is heard, and the nodes have none of its work."""
    rate, until_s = capacity(TWO), 15.0
    alone = run_load([Flow(2 * rate, "A", until_s)], 1, TWO)
    a, _ = by_routers(TWO, [[Flow(2 * rate, "A", until_s)], []], 1, cut=True)
    assert tokens_of(a, "A") >= 0.95 * tokens_of(alone, "A")


@pytest.mark.slow
def test_who_asks_for_less_than_its_share_waits_no_longer_beside_one_who_asks_for_more_of_another_router():
    rate, until_s, ratios = capacity(FOUR), 25.0, []
    b = Flow(0.2 * rate, "B", until_s)
    for seed in range(3):
        alone = run_load([b], seed + 1, FOUR)
        theirs, mine = by_routers(FOUR, [[Flow(1.6 * rate, "A", until_s)], [b]], seed)
        ratios.append(p99(mine, "B") / p99(alone, "B"))
        assert not any(one.error for one in mine)
        assert outcomes(theirs)["rate_limit_exceeded"] > 100
    assert sum(ratios) / len(ratios) <= WITHIN, ratios


def test_what_others_do_on_the_nodes_is_seen_and_ends_with_what_they_say():
    async def main() -> None:
        routers = Routers(TWO)
        first, second = routers.each
        for load in routers.each:
            await load.prober.probe()
        asked = asyncio.create_task(second.ask(Flow(0), 400))
        await asyncio.sleep(0.01)
        report = routers.shared[1].report()
        assert {use.sequences for name, use in report.nodes.items() if name[0] == "d"} == {1}
        routers.shared[0].told(report)
        busy = {name for name, use in report.nodes.items() if use.prefill_tokens}
        seen = {node.id: node for node in first.cluster.view().prefillers}
        assert {name for name, node in seen.items() if node.told is not None and node.told.prefill_tokens} == busy
        assert sum(node.sequences for node in first.cluster.view().decoders) == 1
        assert (await asked).error is None
        routers.shared[0].told(routers.shared[1].report())
        assert sum(node.sequences for node in first.cluster.view().decoders) == 0
        assert routers.shared[0].problem() is None
        await asyncio.sleep(2.0)
        assert "1 of 1 other routers and processes say nothing" in (routers.shared[0].problem() or "")
        routers.shared[0].report()
        assert all(node.told is None for node in first.cluster.nodes.values())

    run_sim(main)
