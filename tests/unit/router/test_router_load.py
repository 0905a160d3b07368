"""A node's load counts from the moment it is chosen: who is routed next sees it, and nothing of it is left behind."""

import asyncio
import random
from dataclasses import replace

import msgspec
import pytest
from support.router_fakes import FakeNode, FakeNodes, Rig, make_rig, until
from support.slow import slow_but

from kvcore.errors import EngineError, KVFerryError, NodeUnavailableError, OverloadedError
from kvcore.handoff import HandoffKind
from kvcore.types import Role
from nodeapi.messages import EngineStats
from nodeapi.sampling import SamplingParams
from router.client_answer import ClientAnswer
from router.nodes.cluster import NodeWork
from router.requests.dispatch import Dispatcher
from router.requests.limits import RequestLimits
from router.requests.run import RequestRun
from router.requests.spec import AnswerRequest, RequestSpec
from router.routing.policy import make_policy

PROMPT = [i % 250 for i in range(100)]
IMPATIENT = RequestLimits(patience_s=0.0, retry_pause_s=0.01)


def spec(number: int, n: int = 1) -> RequestSpec:
    prompt = [number, *PROMPT]
    return RequestSpec(f"r-{number}", prompt, SamplingParams(max_tokens=4, n=n, temperature=0))


def batch(count: int, n: int = 1) -> AnswerRequest:
    return AnswerRequest([spec(number, n) for number in range(count)])


async def read(answer: ClientAnswer) -> int:
    return len([piece async for piece in answer.pieces()])


async def read_run(run: RequestRun) -> int:
    async with run:
        return len([emit async for emit in run])


def loads(rig: Rig) -> dict[str, tuple[int, int]]:
    return {name: (node.sequences, node.prefill_tokens) for name, node in rig.cluster.nodes.items()}


async def assert_no_load(rig: Rig) -> None:
    await rig.dispatcher.aclose()
    await asyncio.sleep(0)
    assert set(loads(rig).values()) == {(0, 0)}
    assert rig.log.in_flight == 0
    assert not rig.dispatcher._opened, "they count against the bound"


def shares(rig: Rig, role: str) -> list[int]:
    """How many legs each node of a role was sent."""
    return [len(node.generates if role == "d" else node.prefills) for node in rig.nodes.nodes if node.id[0] == role]


def assert_even(rig: Rig) -> None:
    for role in "dp":
        counts = shares(rig, role)
        assert sum(counts) == 16 and max(counts) - min(counts) <= 2, f"16 legs were split {counts}"


async def test_the_prompts_of_one_request_are_split_evenly() -> None:
    rig = await make_rig(limits=IMPATIENT)
    assert await read(rig.answerer.start(batch(16))) >= 16
    assert_even(rig)
    await assert_no_load(rig)


async def test_requests_of_one_turn_of_the_loop_are_split_evenly() -> None:
    rig = await make_rig(limits=IMPATIENT)
    runs = [rig.dispatcher.open(spec(number)) for number in range(16)]
    await asyncio.gather(*map(read_run, runs))
    assert_even(rig)
    await assert_no_load(rig)


@pytest.mark.parametrize("busy", ["d0", "d1"])
async def test_a_burst_does_not_fall_upon_the_one_that_had_a_little_less_to_do(busy: str) -> None:
    """Two sequences more, of another router, are two of the sixteen less."""
    rig = await make_rig(limits=IMPATIENT)
    for name in ("d0", "d1"):
        node = rig.cluster.nodes[name]
        assert node.report is not None
        stats = EngineStats(running=20 + 2 * (name == busy), total_blocks=64)
        rig.cluster.reported(node, msgspec.structs.replace(node.report, stats=stats))
    await read(rig.answerer.start(batch(16)))
    assert {name: len(rig.nodes[name].generates) for name in ("d0", "d1")} == {
        busy: 7,
        ("d1" if busy == "d0" else "d0"): 9,
    }


async def test_a_burst_beside_one_running_request_is_split_evenly() -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["d0"].generate_gate = rig.nodes["d1"].generate_gate = gate = asyncio.Event()
    reading = [asyncio.create_task(read(rig.answerer.start(batch(1))))]
    await until(lambda: sum(shares(rig, "d")) == 1)
    reading.append(asyncio.create_task(read(rig.answerer.start(batch(15)))))
    await until(lambda: sum(shares(rig, "d")) == 16)
    assert shares(rig, "d") == [8, 8]
    gate.set()
    await asyncio.gather(*reading)
    await assert_no_load(rig)


async def test_what_a_node_reports_of_our_own_is_not_counted_twice() -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["d0"].generate_gate = rig.nodes["d1"].generate_gate = gate = asyncio.Event()
    reading = asyncio.create_task(read(rig.answerer.start(batch(4))))
    await until(lambda: sum(shares(rig, "d")) == 4)
    await rig.prober.probe()
    assert [node.sequences for node in rig.cluster.view().decoders] == [2, 2]
    gate.set()
    await reading
    await assert_no_load(rig)


async def test_completions_of_a_request_weigh_each() -> None:
    rig = await make_rig(limits=IMPATIENT)
    first = rig.dispatcher.open(spec(0, n=4))
    others = [rig.dispatcher.open(spec(number)) for number in range(1, 5)]
    assert {loads(rig)[name][0] for name in ("d0", "d1")} == {4}
    for run in (first, *others):
        run.drop()
    await assert_no_load(rig)


async def test_requests_whose_node_is_lost_are_spread_over_the_others() -> None:
    names = [("p0", Role.PREFILLER), ("d0", Role.DECODER), ("d1", Role.DECODER), ("d2", Role.DECODER)]
    nodes = FakeNodes([FakeNode(name, role) for name, role in names])
    rig = await make_rig(nodes, limits=IMPATIENT)
    gate = asyncio.Event()
    for name in ("d0", "d1", "d2"):
        nodes[name].generate_gate = gate
    reading = asyncio.create_task(read(rig.answerer.start(batch(18))))
    await until(lambda: sum(shares(rig, "d")) == 18)
    assert shares(rig, "d") == [6, 6, 6]
    rig.cluster.nodes["d0"].problem = "silent"
    rig.dispatcher.node_lost("d0", NodeUnavailableError("silent"))
    await until(lambda: sum(shares(rig, "d")) == 24)
    assert shares(rig, "d") == [6, 9, 9]
    gate.set()
    await reading
    await assert_no_load(rig)


# --- nothing is left -----


async def test_prompts_that_are_refused_leave_nothing() -> None:
    rig = await make_rig(limits=IMPATIENT, max_requests=8)
    with pytest.raises(OverloadedError):
        rig.answerer.start(batch(9))
    await assert_no_load(rig)
    assert await read(rig.answerer.start(batch(8))) >= 8


async def test_prompts_that_no_node_can_take_leave_nothing() -> None:
    rig = await make_rig(limits=IMPATIENT)
    cut = AnswerRequest([spec(0), RequestSpec("long", PROMPT * 20, SamplingParams(max_tokens=4))])
    for node in rig.cluster.nodes.values():
        assert node.report is not None and node.report.engine is not None
        engine = msgspec.structs.replace(node.report.engine, max_context=1000)
        node.report = msgspec.structs.replace(node.report, engine=engine)
    rig.answerer._cluster.max_context = lambda: 5000  # type: ignore[method-assign]
    with pytest.raises(NodeUnavailableError, match="too short a context"):
        rig.answerer.start(cut)
    await assert_no_load(rig)


@pytest.mark.parametrize("error", [EngineError("broken"), OverloadedError("full"), NodeUnavailableError("gone")])
async def test_requests_that_fail_leave_nothing(error: KVFerryError) -> None:
    rig = await make_rig(limits=IMPATIENT)
    for node in rig.nodes.nodes:
        node.prefill_error = node.generate_error = error
    with pytest.raises(KVFerryError):
        await read(rig.answerer.start(batch(6, n=2)))
    await assert_no_load(rig)


@pytest.mark.parametrize("turns", range(6))
async def test_a_client_that_leaves_at_any_turn_leaves_nothing(turns: int) -> None:
    """Turn 0: not one of the tasks has had its first step."""
    rig = await make_rig(limits=IMPATIENT)
    for node in rig.nodes.nodes:
        node.prefill_gate = node.generate_gate = asyncio.Event()
    reading = asyncio.create_task(read(rig.answerer.start(batch(4, n=2))))
    await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    assert sum(sequences for sequences, _ in loads(rig).values()) == 8
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await assert_no_load(rig)


async def test_an_answer_that_is_never_read_leaves_nothing_once_it_is_closed() -> None:
    rig = await make_rig(limits=IMPATIENT)
    answer = rig.answerer.start(batch(3))
    assert sum(sequences for sequences, _ in loads(rig).values()) == 3
    answer.close()
    await assert_no_load(rig)


async def test_what_was_entered_is_not_dropped() -> None:
    rig = await make_rig(limits=IMPATIENT)
    run = rig.dispatcher.open(spec(1))
    async with run:
        run.drop()
        assert sum(sequences for sequences, _ in loads(rig).values()) == 1
        assert [emit.index async for emit in run]
    await assert_no_load(rig)


@pytest.mark.parametrize("kind", [HandoffKind.NIXL, HandoffKind.MOONCAKE])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_decoder_that_waits_for_its_prefiller_is_loaded_all_the_time(kind: HandoffKind, fails: bool) -> None:
    """The decode leg starts last, or its sisters do: the decoder was chosen for all of them at the start."""
    rig = await make_rig(limits=IMPATIENT)
    services = replace(rig.services, handoff=kind)
    dispatcher = Dispatcher(services, make_policy(services.config.policy))
    gate = asyncio.Event()
    for node in rig.nodes.nodes:
        node.prefill_gate = node.generate_gate = gate
        node.generate_error = EngineError("broken") if fails else None
    runs = [dispatcher.open(spec(number, n=3)) for number in range(4)]
    reading = asyncio.gather(*map(read_run, runs), return_exceptions=True)
    for _ in range(8):
        assert [loads(rig)[name][0] for name in ("d0", "d1")] == [6, 6]
        await asyncio.sleep(0)
    gate.set()
    results = await reading
    assert all(isinstance(result, KVFerryError if fails else int) for result in results)
    await dispatcher.aclose()
    await assert_no_load(rig)


# --- what policies see -----


@pytest.mark.parametrize("seed", slow_but(range(5), range(20)))
async def test_a_view_that_is_kept_is_the_one_that_would_be_made_anew(seed: int) -> None:
    """Whatever changes, in whatever order: reports, loads, ends of legs, breakers, restarts."""
    rig, dice = await make_rig(), random.Random(seed)
    works: list[NodeWork] = []
    for _ in range(200):
        node = dice.choice(list(rig.cluster.nodes.values()))
        fake = rig.nodes[node.id]
        match dice.randrange(6):
            case 0:
                chosen = rig.cluster.work_chosen(node.id, sequences=dice.randrange(3), prefill_tokens=dice.randrange(2))
                works.append(chosen)
            case 1 if works:
                rig.cluster.leg_ended(works.pop(dice.randrange(len(works))))
            case 2 if works:
                works.append(rig.cluster.leg_started(works.pop(0), sequences=1))
                rig.cluster.leg_ended(works.pop(), error=dice.choice([None, EngineError("broken")]))
            case 3:
                fake.running, fake.weights = dice.randrange(4), dice.choice(["w1", "w2"])
                fake.draining, fake.incarnation = dice.random() < 0.2, dice.randrange(3)
                await rig.prober.probe()
            case 4:
                node.report = msgspec.structs.replace(fake.report())
        kept = rig.cluster.view()
        for node in rig.cluster.nodes.values():
            node._seen = None
            node.touch()
        assert rig.cluster.view() == kept


async def test_a_node_of_which_nothing_changed_is_not_looked_at_anew() -> None:
    rig = await make_rig()
    before = rig.cluster.view()
    work = rig.cluster.work_chosen("d0", sequences=1, prefill_tokens=0)
    during = rig.cluster.view()
    assert during.decoders[0].sequences == 1 and during.decoders[0] is not before.decoders[0]
    assert during.decoders[1] is before.decoders[1] and during.prefillers[0] is before.prefillers[0]
    rig.cluster.leg_ended(work)
    assert rig.cluster.view() == before


async def test_each_choice_has_its_prompt() -> None:
    rig = await make_rig(limits=IMPATIENT)
    answer = rig.answerer.start(batch(3, n=4))
    places = [number for number in range(3) for _ in range(4)]
    assert [answer.prompt_of(choice) for choice in range(answer.num_choices)] == places
    assert [answer.prompt_token_ids(choice)[0] for choice in range(12)] == places
    assert [choice for number in range(3) for choice in answer.choices_of(number)] == list(range(12))
    answer.close()
    await assert_no_load(rig)
