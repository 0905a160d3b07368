"""What was measured of nodes and is not true any more, in virtual time: what led away from a way is tried again."""

import asyncio

import pytest
from support.sim_load import Flow, Load, Machine, Seen, outcomes, p99, run_load
from support.sim_loop import run_sim

from kvcore.errors import RateLimitError
from kvcore.types import Role
from router.admission.limits import AdmissionLimits
from router.requests.records import RequestRecord
from router.routing.engine_caches import EngineCaches
from router.routing.policy import STAYS, TRIES
from router.routing.rates import Doubt

TOKENS = 400
"""Of each prompt: 25 chunks of 1 KiB, 0.4 s of computing."""
SLOW, FAST = 5e3, 1e7
"""Bytes a second over the link. By the slow one a prompt's KV takes 5 s."""


async def asked(load: Load, until_s: float, each_s: float = 0.5) -> list[tuple[Seen, RequestRecord]]:
    """One request after the other, as many as begin until then."""
    loop, found = asyncio.get_running_loop(), []
    while loop.time() < until_s:
        began = loop.time()
        seen = await load.ask(Flow(0), TOKENS)
        assert seen.error is None
        found.append((seen, load.log.newest()[0]))
        await asyncio.sleep(max(0.0, began + each_s - loop.time()))
    return found


def reasons(found: list[tuple[Seen, RequestRecord]]) -> list[str]:
    return [record.route.reason for _, record in found if record.route is not None]


async def measured(*, apart: bool) -> Load:
    """A prefiller and a decoder, of both of which all is measured, on one machine or two."""
    load = Load(Machine(prefillers=1, decoders=1, apart=apart), router={"first_token_s": None})
    await load.prober.probe()
    await load.warm_up()
    load.cluster.nodes["d0"].rates.prefilled(1000, 1.0, 0.0)
    return load


async def begun(rate: float) -> Load:
    """Their link is so fast."""
    load = await measured(apart=False)
    load.nodes.nodes[1].read_rate = rate
    return load


def test_a_link_that_was_slow_and_is_fast_again_is_used_again():
    """Within 20 s, though it was slow for minutes and not used for as long as it was known to be."""

    async def main() -> None:
        load = await begun(SLOW)
        slow = reasons(await asked(load, 200.0))
        assert slow.count(STAYS) > 0.9 * len(slow), "the decoder computes"
        load.nodes.nodes[1].read_rate = FAST
        loop = asyncio.get_running_loop()
        mended_at = loop.time()
        await asked(load, mended_at + 20.0)
        after = await asked(load, loop.time() + 20.0)
        assert set(reasons(after)) == {"no_prefix"}, "each is handed over"

    run_sim(main)


def test_a_link_that_stays_slow_is_tried_by_few_and_costs_them_little():
    """One request in nine at most, and it loses what computing takes twice."""

    async def main() -> None:
        load = await begun(SLOW)
        await asked(load, 20.0)
        found = await asked(load, 220.0)
        tried = [seen.ttft_s for seen, record in found if record.route is not None and record.route.reason == TRIES]
        assert 0 < len(tried) <= len(found) / 9 + 1, reasons(found)
        assert set(reasons(found)) == {STAYS, TRIES}
        computing_s = TOKENS / load.machine.prefill_rate
        assert max(time or 0.0 for time in tried) < 3 * computing_s + 1.0
        assert max(seen.ttft_s or 0.0 for seen, _ in found) == max(time or 0.0 for time in tried)

    run_sim(main)


def test_one_at_a_time_tries():
    """While a try is under way, which takes seconds, the others keep away."""

    async def main() -> None:
        load = await begun(SLOW)
        await asked(load, 60.0)
        known = load.cluster.nodes["d0"]
        known.rates.far.doubt, known.rates.changes = Doubt(0.0, 8), known.rates.changes + 1
        known.touch()
        at_once = await asyncio.gather(*(load.ask(Flow(0), TOKENS) for _ in range(8)))
        assert all(seen.error is None for seen in at_once)
        found = [record.route.reason for record in load.log.newest()[:8] if record.route is not None]
        assert found.count(TRIES) == 1 and found.count(STAYS) == 7

    run_sim(main)


def test_a_node_has_its_next_prompt_before_it_is_done_with_the_last():
    """A prompt takes 30 ms and the way to its node 4: of each 38 ms 8 were lost."""
    machine = Machine(prefillers=2, decoders=2, prefill_rate=20_000.0, step_s=0.002, places=256, net_s=0.004)
    capacity = 2 * machine.prefill_rate / 600
    flow = Flow(1.5 * capacity, until_s=2.0, lengths=lambda _: 600, max_tokens=2, first_token_s=0.5)
    seen = [one for one in run_load([flow], 1, machine) if one.total_s is not None]
    took_s = max(one.at_s + (one.total_s or 0.0) for one in seen) - min(one.at_s for one in seen)
    assert len(seen) / took_s > 0.95 * capacity


def test_prompts_that_wait_are_bounded_by_their_tokens_too():
    async def main() -> None:
        load = Load(Machine(prefillers=1, decoders=1), router={"first_token_s": 60.0})
        load.admission._limits = AdmissionLimits(waiting_tokens=1000)
        await load.prober.probe()
        await load.warm_up()
        seen = await asyncio.gather(*(load.ask(Flow(0), TOKENS) for _ in range(6)))
        refused = [one.error for one in seen if one.error is not None]
        assert len(refused) == 3 and all(isinstance(error, RateLimitError) for error in refused)
        assert "prompts of 1000 tokens wait" in refused[0].message
        alone = await asyncio.gather(*(load.ask(Flow(0), 1500) for _ in range(2)))
        assert outcomes(alone) == {"ok": 2}, "one may wait however long it is"

    run_sim(main)


HOT = Machine(prefillers=8, decoders=8, prefill_rate=4000.0, step_s=0.02, places=8, shared=1600, read_s=0.1)
"""All prompts begin alike, and that lies in the memory of one decoder of eight."""


def of_hot() -> tuple[float, list[int]]:
    """(p99 of the TTFT, legs of each decoder) at four fifths of what the decoders can take."""

    async def main() -> tuple[float, list[int]]:
        load = Load(HOT, router={"first_token_s": None})
        flow = Flow(0.8 * 8 * HOT.places / (30 * HOT.step_s), until_s=6.0, lengths=lambda _: 100, max_tokens=30)
        seen = await load.drive([flow], 1)
        assert outcomes(seen).keys() == {"ok"}
        return p99(seen, ""), [node.legs for node in load.nodes.nodes if node.role is Role.DECODER]

    return run_sim(main)


@pytest.mark.slow
def test_a_hot_beginning_is_held_by_as_many_decoders_as_its_load_asks_for(monkeypatch):
    """What a decoder has read it holds in its engine's own blocks: the one whose memory it lies in is not filled up."""
    spread_s, spread = of_hot()
    monkeypatch.setattr(EngineCaches, "computed", lambda *_: None)
    crowded_s, crowded = of_hot()
    assert max(spread) < 1.15 * min(spread) and max(crowded) > 1.4 * min(crowded), (spread, crowded)
    assert spread_s < 0.5 * crowded_s, (spread_s, crowded_s)


def test_where_load_does_not_ask_for_it_nobody_else_reads_a_beginning():
    async def main() -> None:
        load = Load(HOT)
        await load.prober.probe()
        for _ in range(12):
            assert (await load.ask(Flow(0), 100)).error is None
        assert [node.id for node in load.nodes.nodes if node.role is Role.DECODER and node.legs] == ["d0"]

    run_sim(main)


async def begun_apart(write_rate: float) -> Load:
    """As `begun`, on two machines: the prefiller hands over at this rate."""
    load = await measured(apart=True)
    load.nodes.nodes[0].write_rate = write_rate
    return load


def test_a_link_by_which_no_prefiller_is_ever_done_in_time_is_found_out_and_found_mended():
    """Its legs are ended with their requests, before they could say how long they wrote."""

    async def main() -> None:
        load = await begun_apart(SLOW / 25)
        found = await asked(load, 100.0)
        assert load.cluster.nodes["p0"].rates.puts["d0"].per_s < TOKENS * 64 / 2, "no faster than all in the time given"
        assert not any(move for _, record in found for leg in record.legs for move in leg.moved), "nobody has told"
        assert reasons(found)[:1] == ["no_prefix"] and set(reasons(found)[1:]) == {STAYS, TRIES}
        load.nodes.nodes[0].write_rate = FAST
        loop = asyncio.get_running_loop()
        await asked(load, loop.time() + 20.0)
        assert set(reasons(await asked(load, loop.time() + 20.0))) == {"no_prefix"}

    run_sim(main)


def test_a_client_that_leaves_says_nothing_of_a_link():
    async def main() -> None:
        load = await begun_apart(FAST)
        for _ in range(5):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await load.ask(Flow(0), TOKENS)
        assert not load.cluster.nodes["p0"].rates.puts

    run_sim(main)


def test_a_prefiller_whose_link_to_the_decoder_is_slow_leaves_its_prompts_to_another():
    """It would be idle for ever, and so chosen each time, and each time the decoder would compute."""

    async def main() -> None:
        load = Load(Machine(prefillers=2, decoders=1, apart=True), router={"first_token_s": None})
        await load.prober.probe()
        await load.warm_up()
        load.cluster.nodes["d0"].rates.prefilled(1000, 1.0, 0.0)
        for node, rate in zip(load.nodes.nodes, (SLOW / 25, FAST), strict=False):
            node.write_rate = rate
        await asked(load, 10.0)
        found = await asked(load, 110.0)
        used = [record.route.prefiller for _, record in found if record.route is not None]
        assert used.count("p1") > 0.95 * len(found), used

    run_sim(main)
