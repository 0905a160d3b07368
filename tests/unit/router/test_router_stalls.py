"""Which silence of a node is too long, what comes of it, and how its trust returns."""

import asyncio
import re
from collections.abc import Iterator

import msgspec
import pytest
from support.router_fakes import FakeNode, FakeNodes, Rig, expected, make_rig, until

from kvcore.clock import ManualClock
from kvcore.errors import DeadlineExceededError, EngineError, NodeUnavailableError
from kvcore.types import Role
from nodeapi.messages import EngineStats, NodeReport
from nodeapi.sampling import SamplingParams
from router.nodes import trust as trust_module
from router.nodes.limits import NodeHealthLimits
from router.nodes.pace import NodePace
from router.nodes.stall_watch import works
from router.nodes.trust import NodeTrust, TrustState
from router.requests.run import RequestRun
from router.requests.spec import RequestSpec

PROMPT = [i % 250 for i in range(100)]
LIMITS = NodeHealthLimits()
STEP_S = LIMITS.look_s


# --- limits --------------------------------------------------------------------------------------------------------


def test_limits_are_the_floors_until_a_node_is_slower() -> None:
    pace = NodePace(LIMITS)
    assert pace.gap_limit_s(2.0) == 2.0
    for _ in range(64):
        pace.ended(0.25)
    assert pace.gap_limit_s(2.0) == 2.0
    for _ in range(64):
        pace.ended(1.0)
    assert pace.gap_limit_s(2.0) == 3.0


def test_one_slow_leg_among_many_changes_nothing() -> None:
    pace = NodePace(LIMITS)
    for _ in range(63):
        pace.ended(0.25)
    pace.ended(30.0)
    assert pace.gap_limit_s(2.0) == 2.0


def test_one_hang_among_few_legs_is_not_the_nodes_pace() -> None:
    pace = NodePace(LIMITS)
    for seconds in (0.2, 4.5, 0.2, 0.2):
        pace.began(seconds, 3)
    assert pace.first_limit_s(5.0, 0) == 5.0
    pace.began(4.0, 3)
    assert pace.first_limit_s(5.0, 0) == 12.0, "two hangs may be its pace"


def test_a_first_token_has_time_for_what_is_to_be_computed() -> None:
    pace = NodePace(LIMITS)
    assert pace.first_limit_s(5.0, 0) == 5.0
    assert pace.first_limit_s(5.0, 32_000) == 5.0 + 160.0, "200 tokens/s, as nothing is known"
    pace.began(1.0, 10_000)
    assert pace.first_limit_s(5.0, 32_000) == pytest.approx(5.0 + 3 * 3.2)
    pace.began(4.0, 3)
    assert pace.first_limit_s(5.0, 0) == 12.0


def test_a_node_that_was_suspected_wrongly_has_more_time_for_a_while() -> None:
    pace = NodePace(LIMITS)
    for limit_s in (4.0, 8.0, 8.0):
        pace.was_only_slow()
        assert pace.gap_limit_s(2.0) == limit_s
    for _ in range(2 * LIMITS.slack_legs):
        pace.ended(0.0)
    assert pace.gap_limit_s(2.0) == 2.0


async def test_a_node_that_hung_has_no_more_time_than_before(rig: Rig) -> None:
    known = rig.cluster.nodes["d0"]
    for silent_s, limit_s in ((11.0, 2.0), (3600.0, 2.0), (9.0, 4.0), (11.0, 4.0)):
        known.trust.suspect(1000.0, "x", 5.0)
        works(known, 1000.0 + silent_s)
        assert not known.trust.suspected and known.pace.gap_limit_s(2.0) == limit_s


async def test_a_prefiller_that_keeps_pace_has_no_more_time_than_others_again() -> None:
    rig = await make_rig(FakeNodes([FakeNode("p0", Role.PREFILLER), FakeNode("d0", Role.DECODER)]), node_limits=LIMITS)
    pace = rig.cluster.nodes["p0"].pace
    pace.was_only_slow()
    assert pace.first_limit_s(5.0, 0) == 10.0
    for number in range(LIMITS.slack_legs):
        await tokens_of(open_run(rig, f"r{number}"))
    assert len(rig.nodes["p0"].prefills) == LIMITS.slack_legs
    assert pace.first_limit_s(5.0, 0) == 5.0


async def test_a_node_that_was_started_anew_has_its_pace_to_show(rig: Rig) -> None:
    known, report = rig.cluster.nodes["d0"], rig.nodes["d0"].report()
    known.pace.was_only_slow()
    known.pace.ended(10.0)
    rig.cluster.reported(known, report)
    assert known.pace.gap_limit_s(2.0) == 60.0
    anew = msgspec.structs.replace(
        report, node=msgspec.structs.replace(report.node, incarnation=report.node.incarnation + 1)
    )
    rig.cluster.reported(known, anew)
    assert known.pace.gap_limit_s(2.0) == 2.0


# --- trust ---------------------------------------------------------------------------------------------------------


def _table() -> Iterator[tuple[str, str, set[str]]]:
    for state, event, after in re.findall(r"^    (\w+) +(\w+) +([a-z_ ]+)$", trust_module.__doc__ or "", re.M):
        yield state, event, set(after.split())


def _in(state: str) -> NodeTrust:
    trust = NodeTrust(LIMITS)
    if state != "trusted":
        trust.suspect(0.0, "x")
    if state == "on_trial":
        trust.works()
    return trust


def test_the_table_of_trust_is_what_it_does() -> None:
    rows = list(_table())
    assert {state for state, _, _ in rows} == set(TrustState)
    for state, event, after in rows:
        trust, seen = _in(state), set[str]()
        for _ in range(8):
            match event:
                case "suspect":
                    trust.suspect(1.0, "y")
                case "works":
                    trust.works(lost="on_trial" in after)
                case _:
                    trust.succeeded()
            seen.add(trust.state)
        assert seen - {state} == after - {state}, (state, event, seen)


def test_a_node_on_trial_gets_twice_as_many_legs_with_each_success() -> None:
    trust = _in("on_trial")
    for room in (1, 2, 4, 8, 16):
        assert trust.has_room(room - 1) and not trust.has_room(room)
        trust.succeeded()
    assert trust.state is TrustState.TRUSTED and trust.has_room(1000)


# --- legs ----------------------------------------------------------------------------------------------------------


def open_run(rig: Rig, name: str = "r", max_tokens: int = 8) -> RequestRun:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return rig.dispatcher.open(RequestSpec(name, PROMPT, sampling))


async def tokens_of(run: RequestRun) -> list[int]:
    async with run:
        return [token async for emit in run for token in emit.token_ids]


def look(rig: Rig, seconds: float) -> None:
    for _ in range(round(seconds / STEP_S)):
        rig.cluster.stalls.look(STEP_S)


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def begin(rig: Rig, name: str = "r") -> "tuple[RequestRun, asyncio.Task[list[int]], FakeNode]":
    run = open_run(rig, name)
    assert run.record.route is not None
    return run, asyncio.create_task(tokens_of(run)), rig.nodes[run.record.route.decoder]


@pytest.fixture
async def rig() -> Rig:
    nodes = FakeNodes([FakeNode(name, Role.DECODER) for name in ("d0", "d1")])
    return await make_rig(nodes, node_limits=LIMITS)


async def test_a_stream_that_stalls_goes_on_elsewhere_and_its_node_gets_no_more(rig: Rig) -> None:
    for node in rig.nodes.nodes:
        node.token_gate = asyncio.Event()
    run, task, node = await begin(rig)
    other = next(one for one in rig.nodes.nodes if one is not node)
    assert other.token_gate is not None
    other.token_gate.set()
    await until(lambda: run.machine.completion_tokens == 1)
    look(rig, 1.75)
    assert not task.done() and len(run.record.legs) == 1
    look(rig, 0.25)
    assert await task == expected(PROMPT, 8)
    assert run.record.retried_legs == [("decode", "node_stalled")]
    why = f"node {node.id} stalled: no token for 2.0 s (limit 2.0 s)"
    assert run.record.legs[0].error == f"node_stalled: {why}"
    assert rig.cluster.nodes[node.id].reason(0.0) == f"suspected: {why}"
    for number in range(4):
        assert await tokens_of(open_run(rig, f"again{number}")) == expected(PROMPT, 8)
    assert len(node.generates) == 1


async def test_all_legs_of_a_node_that_stalls_leave_it_at_once(rig: Rig) -> None:
    for node in rig.nodes.nodes:
        node.token_gate = asyncio.Event()
    run, first, node = await begin(rig)
    await until(lambda: run.machine.completion_tokens == 1)
    other = next(one for one in rig.nodes.nodes if one is not node)
    assert other.token_gate is not None
    other.token_gate.set()
    look(rig, 1.5)
    runs = [await begin(rig, f"r{number}") for number in range(4)]
    assert {begun.id for _, _, begun in runs} == {"d0", "d1"}
    await until(lambda: all(begun.machine.completion_tokens for begun, _, _ in runs))
    look(rig, 2.0)  # the first tokens of the others were signs of its life
    for task in (first, *(task for _, task, _ in runs)):
        assert await task == expected(PROMPT, 8)
    moved = [begun for begun, _, at in runs if at is node] + [run]
    assert len(moved) > 1 and all(begun.record.retried_legs == [("decode", "node_stalled")] for begun in moved)


async def test_a_node_that_works_for_others_is_busy_and_not_stalled(rig: Rig) -> None:
    gate = asyncio.Event()
    rig.nodes["d0"].generate_gate = rig.nodes["d1"].generate_gate = gate
    run, task, node = await begin(rig)
    await turns()
    known = rig.cluster.nodes[node.id]
    for count in range(30):
        look(rig, 1.0)
        report = node.report()
        stats = EngineStats(running=1, counters={"prefill_tokens": count})
        rig.cluster.reported(known, _with(report, stats))
    assert len(run.record.legs) == 1 and not known.trust.suspected
    gate.set()
    assert await task == expected(PROMPT, 8)


def _with(report: NodeReport, stats: EngineStats) -> NodeReport:
    return NodeReport(node=report.node, engine=report.engine, stats=stats, segments=report.segments)


async def test_where_nobody_can_take_over_a_stalled_leg_is_waited_for_and_learnt_from() -> None:
    rig = await make_rig(FakeNodes([FakeNode("d0", Role.DECODER)]), node_limits=LIMITS)
    node, known = rig.nodes["d0"], rig.cluster.nodes["d0"]
    node.token_gate = asyncio.Event()
    run, task, _ = await begin(rig)
    await until(lambda: run.machine.completion_tokens == 1)
    look(rig, 10.0)
    assert known.trust.suspected and len(run.record.legs) == 1
    node.token_gate.set()
    assert await task == expected(PROMPT, 8)
    await rig.prober.probe()
    assert not known.trust.suspected and known.trust.state is TrustState.ON_TRIAL
    assert known.pace.gap_limit_s(2.0) > 2.0


async def test_a_request_goes_elsewhere_twice_at_most_each_time_after_twice_as_long() -> None:
    nodes = FakeNodes([FakeNode(f"d{number}", Role.DECODER) for number in range(4)])
    rig = await make_rig(nodes, node_limits=LIMITS)
    gate = asyncio.Event()
    for node in nodes.nodes:
        node.token_gate = node.generate_gate = gate
    run, task, _ = await begin(rig)
    limit_s = 5.0 + len(PROMPT) * LIMITS.unknown_token_s
    for legs, waited_s in enumerate((limit_s, 2 * limit_s), 2):
        await turns()
        look(rig, waited_s - STEP_S)
        assert len(run.record.legs) == legs - 1
        look(rig, STEP_S)
        assert len(run.record.legs) == legs
    await turns()
    look(rig, 100.0)
    assert len(run.record.legs) == 3
    gate.set()
    assert await task == expected(PROMPT, 8)


async def test_a_prefill_that_stalls_is_done_by_another_or_else_by_the_decoder() -> None:
    rig = await make_rig(node_limits=LIMITS)
    for node in rig.nodes.nodes:
        node.wait_for_handoff = node.id[0] == "d"
        node.prefill_gate = asyncio.Event() if node.id[0] == "p" else None
    run = open_run(rig)
    task = asyncio.create_task(tokens_of(run))
    await turns()
    look(rig, 6.0)
    await turns()
    assert [leg.kind for leg in run.record.legs].count("prefill") == 2, "it is another one's"
    look(rig, 12.0)
    assert await task == expected(PROMPT, 8)
    assert [(leg.error or "").split(":")[0] for leg in run.record.legs if leg.kind == "prefill"] == ["node_stalled"] * 2
    assert {name for name, node in rig.cluster.nodes.items() if node.trust.suspected} == {"p0", "p1"}


async def test_a_prefiller_that_stalls_gives_no_decoder_more_time() -> None:
    """Only a leg of the same kind has twice as long: else a request between two that hang would be held for thrice."""
    rig = await make_rig(node_limits=LIMITS)
    for node in rig.nodes.nodes:
        node.wait_for_handoff = node.id[0] == "d"
        node.prefill_gate = asyncio.Event() if node.id[0] == "p" else None
        node.token_gate = asyncio.Event() if node.id[0] == "d" else None
    run = open_run(rig)
    task = asyncio.create_task(tokens_of(run))
    await turns()
    look(rig, 6.0)
    await turns()
    for name in ("p0", "p1"):
        gate = rig.nodes[name].prefill_gate
        assert gate is not None
        gate.set()
    await until(lambda: run.machine.completion_tokens == 1)
    look(rig, 2.0)
    await until(lambda: len(run.machine.retries) == 2)
    await turns()
    assert run.machine.retries == [("prefill", "node_stalled"), ("decode", "node_stalled")]
    assert (run.machine.stalls(), run.machine.stalls("decode"), run.machine.stalls("prefill")) == (2, 1, 1)
    assert [leg.patience for leg in rig.cluster.stalls._legs.values()] == [2.0], (
        "of one decoder that hung, not of two nodes"
    )
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_decode_leg_that_waits_for_its_prefill_is_not_silent_by_its_own_fault() -> None:
    rig = await make_rig(node_limits=LIMITS)
    gate = asyncio.Event()
    for node in rig.nodes.nodes:
        node.wait_for_handoff, node.prefill_gate = node.id[0] == "d", gate if node.id[0] == "p" else None
    run = open_run(rig)
    assert run.record.route is not None
    task = asyncio.create_task(tokens_of(run))
    await turns()
    look(rig, 4.75)
    gate.set()
    await turns()
    look(rig, 4.75)
    assert not any(node.trust.suspected for node in rig.cluster.nodes.values())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_decoder_that_must_compute_after_all_has_the_time_for_it() -> None:
    rig = await make_rig(node_limits=LIMITS)
    for node in rig.nodes.nodes:
        if node.id[0] == "p":
            node.prefill_error = EngineError("no memory")
        else:
            node.wait_for_handoff, node.generate_gate = True, asyncio.Event()
    run = open_run(rig)
    task = asyncio.create_task(tokens_of(run))
    await turns()
    (decoder,) = [leg.node for leg in run.record.legs if leg.kind == "decode"]
    assert rig.nodes[decoder].handoffs_ended
    look(rig, 5.25)
    assert not rig.cluster.nodes[decoder].trust.suspected, "100 tokens have half a second more"
    look(rig, STEP_S)
    assert rig.cluster.nodes[decoder].trust.suspected
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_client_that_reads_slowly_accuses_nobody(rig: Rig) -> None:
    run = open_run(rig, max_tokens=600)
    async with run:
        await turns()
        await until(lambda: run.outputs.is_full)
        await turns()  # its next delta is one too many
        look(rig, 30.0)
        assert not any(node.trust.suspected for node in rig.cluster.nodes.values())
        assert [token async for emit in run for token in emit.token_ids] == expected(PROMPT, 600)


async def test_a_suspected_node_is_asked_for_a_token_before_it_gets_a_request(rig: Rig) -> None:
    known, node = rig.cluster.nodes["d0"], rig.nodes["d0"]
    known.trust.suspect(0.0, "x")
    node.generate_gate = asyncio.Event()
    rig.prober._config = rig.config.router.__class__(connect_timeout_s=0.01)
    await rig.prober.probe()
    assert known.trust.suspected and [one.request_id for one in node.generates] == ["trial-d0-1"]
    node.generate_gate.set()
    rig.prober._config = rig.config.router
    await rig.prober.probe()
    assert known.trust.state is TrustState.ON_TRIAL
    runs = [open_run(rig, f"r{number}") for number in range(4)]
    on_trial = [run.record.route.decoder for run in runs if run.record.route is not None].count("d0")
    for run in runs:
        run.drop()
    assert on_trial == 1


async def test_a_suspected_node_that_is_slow_has_as_long_for_its_token_as_any_request(rig: Rig) -> None:
    """One that others keep busy makes its token after several rounds of probes; no round waits for it."""
    known, node = rig.cluster.nodes["d0"], rig.nodes["d0"]
    known.trust.suspect(0.0, "x")
    node.generate_gate = asyncio.Event()
    rig.prober._config = rig.config.router.__class__(connect_timeout_s=0.001, probe_interval_s=0.001)
    rounds: list[int] = []
    rig.prober.on_round.append(lambda: rounds.append(1))
    probing = asyncio.create_task(rig.prober.run())
    await until(lambda: len(rounds) > 5)
    assert known.trust.suspected and [one.request_id for one in node.generates] == ["trial-d0-1"]
    (asked,) = node.generates
    assert asked.deadline_s >= rig.config.router.stall_first_s
    node.generate_gate.set()
    await until(lambda: known.trust.state is TrustState.ON_TRIAL)
    known.trust.suspect(0.0, "again")
    node.generate_gate = asyncio.Event()
    await until(lambda: len(node.generates) == 2)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    assert not rig.prober._trials, "no trial outlives the prober"


async def test_a_prefiller_on_trial_gets_one_of_those_that_come_at_once() -> None:
    rig = await make_rig(node_limits=LIMITS)
    known = rig.cluster.nodes["p0"]
    known.trust.suspect(0.0, "x")
    works(known, 1.0)
    runs = [open_run(rig, f"r{number}") for number in range(4)]
    assert [run.record.route.prefiller for run in runs if run.record.route is not None].count("p0") == 1
    for run in runs:
        run.drop()


# --- probes --------------------------------------------------------------------------------------------------------


class Late(FakeNodes):
    """Probes of some nodes have no answer in time, or none at all."""

    error: NodeUnavailableError | DeadlineExceededError | None = None

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        if self.error is not None and self.by_url[url].id == "d0":
            raise self.error
        return await super().info(url, timeout_s=timeout_s)


async def late_rig() -> tuple[Rig, Late]:
    nodes = Late([FakeNode(name, Role.DECODER) for name in ("d0", "d1")])
    return await make_rig(nodes, node_limits=LIMITS), nodes


async def test_a_node_is_lost_with_its_third_late_probe_and_avoided_from_the_first_on() -> None:
    rig, nodes = await late_rig()
    nodes.error = DeadlineExceededError("late")
    for _ in range(2):
        await rig.prober.probe()
        view = rig.cluster.view()
        assert [(node.id, node.doubtful) for node in view.decoders] == [("d0", True), ("d1", False)]
        run = open_run(rig)
        assert run.record.route is not None and run.record.route.decoder == "d1"
        run.drop()
    await rig.prober.probe()
    assert [node.id for node in rig.cluster.view().decoders] == ["d1"]
    nodes.error = None
    await rig.prober.probe()
    assert rig.cluster.nodes["d0"].trust.state is TrustState.ON_TRIAL, "one answer is not full trust"


async def test_with_every_decoder_late_once_requests_are_still_taken() -> None:
    rig, nodes = await late_rig()
    nodes.error = DeadlineExceededError("late")
    rig.cluster.nodes["d1"].problem = "down"
    await rig.prober.probe()
    rig.cluster.nodes["d1"].problem = "down"
    run = open_run(rig)
    assert run.record.route is not None and run.record.route.decoder == "d0"
    run.drop()


async def test_a_node_that_refuses_its_connection_is_lost_at_once() -> None:
    rig, nodes = await late_rig()
    nodes.error = NodeUnavailableError("refused")
    await rig.prober.probe()
    assert [node.id for node in rig.cluster.view().decoders] == ["d1"]


async def test_the_watch_counts_its_own_looks() -> None:
    rig = await make_rig(FakeNodes([FakeNode("d0", Role.DECODER), FakeNode("d1", Role.DECODER)]))
    clock = rig.cluster._clock = ManualClock()
    for node in rig.nodes.nodes:
        node.token_gate = asyncio.Event()
    run, task, node = await begin(rig)
    await until(lambda: run.machine.completion_tokens == 1)
    clock.advance(3600.0)  # this process was stopped
    look(rig, STEP_S)
    assert not rig.cluster.nodes[node.id].trust.suspected
    for one in rig.nodes.nodes:
        assert one.token_gate is not None
        one.token_gate.set()
    assert await task == expected(PROMPT, 8)
