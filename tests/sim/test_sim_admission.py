"""More load than there is room for, in virtual time: what is answered is answered in time, and shares are fair."""

import asyncio
import random

import pytest
from msgspec.structs import replace
from support.sim_load import Flow, Load, Machine, Seen, goodput, outcomes, p99, run_load
from support.sim_loop import run_sim

from kvcore.config.schema import RoutingPolicy
from kvcore.errors import NodeUnavailableError, RateLimitError, StoppingError
from nodeapi.messages import NodeReport
from router.nodes.stall_watch import works
from router.requests.run import RequestRun

TWO = Machine()
FOUR = Machine(prefillers=4, decoders=4)
FULL = Machine(prefillers=8, decoders=2, prefill_rate=4000.0, step_s=0.05, places=16)
"""Prompts are no trouble, places are."""
MEAN_TOKENS = 195
"""Of a Flow's prompts."""
WITHIN = 1.2


def capacity(machine: Machine, max_tokens: int = 8) -> float:
    """Requests a second."""
    places = machine.decoders * machine.places / (max_tokens * machine.step_s)
    return min((machine.prefillers or machine.decoders) * machine.prefill_rate / MEAN_TOKENS, places)


def goodputs(machine: Machine, seed: int, max_tokens: int = 8, until_s: float = 15.0) -> list[float]:
    """At capacity, and at 2 and 5 times of it."""
    rate = capacity(machine, max_tokens)
    found = []
    for times in (1, 2, 5):
        seen = run_load([Flow(times * rate, until_s=until_s, max_tokens=max_tokens)], seed, machine)
        refused = [one for one in seen if one.error is not None]
        assert all(isinstance(one.error, RateLimitError) and one.retry_after_s > 0 for one in refused)
        found.append(goodput(seen, until_s=until_s))
    return found


def assert_kept(machine: Machine, seed: int, max_tokens: int = 8) -> None:
    alone, *more = goodputs(machine, seed, max_tokens)
    assert alone > 0.7 * capacity(machine, max_tokens)
    assert min(more) >= 0.9 * alone, (alone, more)


def test_with_more_than_it_can_take_as_much_is_answered_in_time():
    rate = capacity(TWO)
    seen = run_load([Flow(4 * rate, until_s=4.0)], 1, TWO)
    assert goodput(seen, until_s=4.0) >= rate
    assert outcomes(seen)["rate_limit_exceeded"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("machine, max_tokens", [(TWO, 8), (FULL, 40), (Machine(0, 3), 8)])
@pytest.mark.parametrize("seed", [2])
def test_as_much_is_answered_in_time_whatever_is_short(machine: Machine, max_tokens: int, seed: int):
    assert_kept(machine, seed, max_tokens)


@pytest.mark.slow
def test_without_admission_it_would_not_be():
    seen = run_load([Flow(2 * capacity(TWO), until_s=10.0)], 1, TWO, admits=False)
    assert goodput(seen, until_s=10.0) < 0.4 * capacity(TWO)


def times_beside(seed: int, until_s: float) -> tuple[float, float, list[Seen]]:
    """Of B, that asks for a fifth of what the nodes can do: p99 of its TTFT alone, and beside A, who asks for 1.6 times
    that much."""
    b, rate = Flow(0.2 * capacity(FOUR), "B", until_s), capacity(FOUR)
    alone = run_load([b], seed, FOUR)
    both = run_load([b, Flow(1.6 * rate, "A", until_s)], seed, FOUR)
    return p99(alone, "B"), p99(both, "B"), both


@pytest.mark.slow
def test_who_asks_for_less_than_its_share_waits_no_longer_beside_one_who_asks_for_more():
    alone_s, beside_s, both = times_beside(0, 25.0)
    assert beside_s <= WITHIN * alone_s
    assert not any(one.error for one in both if one.user == "B")
    assert outcomes([one for one in both if one.user == "A"])["rate_limit_exceeded"] > 100


@pytest.mark.slow
def test_so_it_is_over_many_runs():
    ratios = []
    for seed in range(3):
        alone_s, beside_s, both = times_beside(seed, 50.0)
        ratios.append(beside_s / alone_s)
        mine = outcomes([one for one in both if one.user == "B"])
        assert mine["rate_limit_exceeded"] <= 0.01 * mine.total()
    assert sum(ratios) / len(ratios) <= WITHIN, ratios


def test_without_load_nobody_waits_and_nobody_is_refused():
    async def main() -> None:
        load = Load(FOUR)
        seen = await load.drive([Flow(0.3 * capacity(FOUR), until_s=10.0)], 1)
        assert not any(one.error for one in seen)
        waited = sorted(record.waited_s for record in load.log.newest()[: len(seen)])
        assert waited[int(0.9 * len(waited))] == 0.0
        assert not load.admission.refused

    run_sim(main)


@pytest.mark.slow
def test_two_who_ask_for_too_much_get_the_same():
    rate = capacity(TWO)
    seen = run_load([Flow(rate, "A", 20.0), Flow(3 * rate, "B", 20.0)], 3, TWO)
    tokens = {user: sum(one.tokens for one in seen if one.user == user and one.error is None) for user in "AB"}
    assert 0.8 < tokens["A"] / tokens["B"] < 1.25, tokens


def test_who_has_priority_is_served_and_the_others_are_refused():
    rate = capacity(TWO)
    seen = run_load([Flow(0.5 * rate, "high", 4.0, rank=0), Flow(2 * rate, "low", 4.0, rank=2)], 1, TWO)
    high = outcomes([one for one in seen if one.user == "high"])
    assert high["ok"] >= 0.95 * high.total()
    assert outcomes([one for one in seen if one.user == "low"])["rate_limit_exceeded"] > 15


@pytest.mark.parametrize("kind", ["prefillers", "decoders"])
def test_sixteen_at_once_are_split_evenly(kind: str):
    """Before anything is known of the nodes, too."""

    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        await load.prober.probe()
        for _ in range(2):
            before = {node.id: node.legs for node in load.nodes.nodes}
            await asyncio.gather(*(load.ask(Flow(0), 200) for _ in range(16)))
            split = [node.legs - before[node.id] for node in load.nodes.nodes if node.id[0] == kind[0]]
            assert sum(split) == 16 and max(split) - min(split) <= 2, split

    run_sim(main)


async def full(load: Load) -> list[asyncio.Task[Seen]]:
    """Requests that keep both prefillers busy for a second."""
    await load.prober.probe()
    await load.warm_up()
    running = [asyncio.create_task(load.ask(Flow(0), 1000)) for _ in range(2)]
    await asyncio.sleep(0.1)
    return running


def test_who_leaves_while_it_waits_is_gone():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        running = await full(load)
        waiting = [asyncio.create_task(load.ask(Flow(0, str(number)), 100)) for number in range(3)]
        await asyncio.sleep(0.1)
        assert len(load.admission) == 3
        waiting[1].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(load.admission) == 2
        seen = await asyncio.gather(*running, waiting[0], waiting[2])
        assert outcomes(seen) == {"ok": 4}
        assert load.log.total == 12 + 4, "the one that left never began"

    run_sim(main)


def test_who_leaves_in_the_moment_it_gets_in_leaves_no_load():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        running = await full(load)
        waiting = asyncio.create_task(load.ask(Flow(0), 100))
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        load.admission.on_admitted.append(lambda _: loop.call_soon(waiting.cancel))
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.gather(*running)
        assert {(node.sequences, node.prefill_tokens) for node in load.cluster.nodes.values()} == {(0, 0)}
        assert not load.dispatcher._opened and not load.log.in_flight

    run_sim(main)


def test_a_deadline_of_the_clients_own_is_kept_or_refused():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        running = await full(load)
        soon = await load.ask(Flow(0, first_token_s=0.5), 100)
        assert isinstance(soon.error, RateLimitError) and "its first token" in soon.error.message
        assert soon.retry_after_s == pytest.approx(1.0 - 0.45, abs=0.1)
        late = await load.ask(Flow(0, first_token_s=2.0), 100)
        assert late.error is None and late.ttft_s is not None and 0.9 < late.ttft_s < 1.3
        record = load.log.newest()[0]
        assert record.waited_s == pytest.approx(0.9, abs=0.1) and record.ttft_s == pytest.approx(late.ttft_s, abs=0.01)
        await asyncio.gather(*running)

    run_sim(main)


def test_whose_turn_does_not_come_in_time_leaves():
    """More of those with priority came than could be known."""

    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        running = await full(load)
        mine = asyncio.create_task(load.ask(Flow(0, first_token_s=1.5), 100))
        await asyncio.sleep(0.01)
        running += [asyncio.create_task(load.ask(Flow(0, rank=0), 1000)) for _ in range(4)]
        seen = await mine
        assert seen.error is not None and "its turn did not come in time" in seen.error.message
        assert seen.retry_after_s > 0.3
        assert load.admission.refused == {"missed": 1}
        assert outcomes(await asyncio.gather(*running)) == {"ok": 6}

    run_sim(main)


def test_who_needs_no_prefiller_does_not_wait_for_one():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 1.5})
        running = await full(load)
        running += [asyncio.create_task(load.ask(Flow(0, "a"), 100)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert len(load.admission) == 3
        seen = await load.ask(Flow(0, "a"), 7)
        assert seen.error is None and seen.ttft_s is not None and seen.ttft_s < 0.1
        assert len(load.admission) == 3
        assert outcomes(await asyncio.gather(*running)) == {"ok": 5}

    run_sim(main)


def test_who_fits_a_node_of_a_short_context_does_not_wait_for_one_of_a_long_context():
    async def main() -> None:
        load = Load(Machine(prefillers=0, decoders=2), router={"first_token_s": 60.0})
        short = load.nodes.nodes[1]
        usual = short.report

        def report() -> NodeReport:
            found = usual()
            assert found.engine is not None
            return replace(found, engine=replace(found.engine, max_context=200))

        short.report = report  # type: ignore[method-assign]
        await load.prober.probe()
        await load.warm_up()
        running = [asyncio.create_task(load.ask(Flow(0), 1000)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert len(load.admission) == 2 and not load.cluster.nodes[short.id].sequences
        seen = await load.ask(Flow(0), 100)
        assert seen.error is None and seen.ttft_s is not None and seen.ttft_s < 0.2
        assert len(load.admission) == 2
        assert outcomes(await asyncio.gather(*running)) == {"ok": 3}

    run_sim(main)


def test_a_bug_in_what_is_let_in_is_that_requests_alone():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        running = await full(load)
        opens = load.dispatcher.open

        def open_badly(*args: object, **named: object) -> RequestRun:
            load.dispatcher.open = opens  # type: ignore[method-assign]
            raise ValueError("a bug")

        load.dispatcher.open = open_badly  # type: ignore[method-assign]
        waiting = [asyncio.create_task(load.ask(Flow(0), 100)) for _ in range(2)]
        first, second = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(first, ValueError) and isinstance(second, Seen) and second.error is None
        assert outcomes(await asyncio.gather(*running)) == {"ok": 2}

    run_sim(main)


def test_the_queue_is_bounded():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": None, "max_waiting": 3})
        running = await full(load)
        running += [asyncio.create_task(load.ask(Flow(0), 100)) for _ in range(5)]
        assert outcomes(await asyncio.gather(*running)) == {"ok": 5, "rate_limit_exceeded": 2}
        assert load.admission.refused == {"full": 2}

    run_sim(main)


def test_who_waits_when_the_router_stops_is_told_so():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        running = await full(load)
        waiting = asyncio.create_task(load.ask(Flow(0), 100))
        await asyncio.sleep(0.1)
        assert not await load.dispatcher.drain(10.0)
        assert isinstance((await waiting).error, StoppingError)
        assert outcomes(await asyncio.gather(*running)) == {"ok": 2}

    run_sim(main)


def test_a_node_that_was_slow_once_is_tried_again():
    """Its rate is known from a warm-up of a minute: by that nothing would ever come in time."""

    async def main() -> None:
        load = Load(Machine(prefillers=1, decoders=1))
        await load.prober.probe()
        load.cluster.nodes["p0"].rates.prefilled(100, 60.0, 0.0)
        seen = [await load.ask(Flow(0, first_token_s=1.0), 300) for _ in range(5)]
        assert outcomes(seen) == {"ok": 5}
        assert load.cluster.nodes["p0"].rates.prefill.per_s == pytest.approx(1000, rel=0.05)

    run_sim(main)


def test_who_waits_for_others_load_to_go_hears_that_the_router_stops_at_its_next_probe():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        await load.prober.probe()
        for node in load.cluster.nodes.values():
            node.others_sequences = 1000
        load.prober.on_round.append(load.admission.wake)
        waiting = asyncio.create_task(load.ask(Flow(0), 100))
        await asyncio.sleep(0.1)
        assert not await load.dispatcher.drain(10.0) and len(load.admission) == 1
        for tell in load.prober.on_round:
            tell()
        assert isinstance((await asyncio.wait_for(waiting, 1.0)).error, StoppingError)

    run_sim(main)


async def suspect_all(load: Load) -> None:
    """For a moment, while two requests run and two wait."""
    for node in load.cluster.nodes.values():
        node.trust.suspect(0.0, "silent")
        node.touch()
    load.admission.wake()
    await asyncio.sleep(0.01)


def test_who_waits_for_a_turn_waits_for_a_node_too():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        running = await full(load)
        waiting = [asyncio.create_task(load.ask(Flow(0), 100)) for _ in range(2)]
        await asyncio.sleep(0.01)
        await suspect_all(load)
        assert outcomes(await asyncio.gather(*running)) == {"ok": 2}
        assert len(load.admission) == 2, "as new ones do"
        for node in load.cluster.nodes.values():
            works(node, 0.0)
        load.admission.wake()
        assert outcomes(await asyncio.gather(*waiting)) == {"ok": 2}

    run_sim(main)


def test_who_waits_and_no_node_comes_in_time_is_told_what_is_wrong():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": 60.0})
        running = await full(load)
        waiting = asyncio.create_task(load.ask(Flow(0, first_token_s=8.0), 100))
        await asyncio.sleep(0.01)
        await suspect_all(load)
        error = (await waiting).error
        assert isinstance(error, NodeUnavailableError) and "suspected: silent" in error.message
        await asyncio.gather(*running)

    run_sim(main)


def test_a_warm_up_refuses_nobody():
    """A minute was measured for the first prompt; the next ones come at once, and each takes 0.3 s."""

    async def main() -> None:
        load = Load(Machine(prefillers=1, decoders=1))
        await load.prober.probe()
        load.cluster.nodes["p0"].rates.prefilled(100, 60.0, 0.0)
        load.cluster.nodes["p0"].touch()
        seen = await asyncio.gather(*(load.ask(Flow(0, first_token_s=5.0), 300) for _ in range(8)))
        assert outcomes(seen) == {"ok": 8}

    run_sim(main)


def test_whose_turn_never_comes_is_told_so_when_a_request_must_have_ended():
    async def main() -> None:
        load = Load(TWO, router={"first_token_s": None, "request_timeout_s": 20.0})
        await load.prober.probe()
        for node in load.cluster.nodes.values():  # other routers' requests, that hang
            node.others_sequences = 1000
        began = asyncio.get_running_loop().time()
        seen = await asyncio.wait_for(load.ask(Flow(0), 100), 60.0)
        assert outcomes([seen]) == {"rate_limit_exceeded": 1}
        assert asyncio.get_running_loop().time() - began == pytest.approx(20.0, abs=0.1)

    run_sim(main)


def test_a_prefiller_that_hangs_costs_what_computing_takes():
    """It had two minutes. Nothing probes it here, so that nobody takes its leg away."""

    async def main() -> None:
        load = Load(Machine(prefillers=1, decoders=1))
        await load.prober.probe()
        await load.warm_up()
        load.cluster.nodes["d0"].rates.prefilled(1000, 1.0, 0.0)
        load.nodes.nodes[0].hangs = True
        seen = await load.ask(Flow(0), 400)
        assert seen.error is None and seen.ttft_s is not None
        assert seen.ttft_s == pytest.approx(2 * (0.4 + 0.4) + 0.4, abs=0.1), "the wait, and its own computing"

    run_sim(main)


def burst_p99(policy: str, seed: int, *, admits: bool) -> float:
    """Of the TTFT, over bursts of sixteen."""

    async def main() -> float:
        load = Load(TWO, admits, {"policy": RoutingPolicy(policy), "first_token_s": None})
        await load.prober.probe()
        await load.warm_up()
        load.seen.clear()
        flow, dice = Flow(0), random.Random(seed)
        for _ in range(3):
            await asyncio.gather(*(load.ask(flow, flow.lengths(dice)) for _ in range(16)))
        return p99(load.seen, "")

    return run_sim(main)


@pytest.mark.parametrize("admits", [False, True])
def test_bursts_are_no_worse_than_by_round_robin(admits: bool):
    ours, theirs = (
        sum(burst_p99(policy, seed, admits=admits) for seed in range(4)) for policy in ("prefix_aware", "round_robin")
    )
    assert ours <= theirs
