"""Requests through the dispatcher over fake nodes: every failure first, then the plain case."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from support.router_fakes import CHUNK_TOKENS, FakeNode, FakeNodes, Rig, expected, make_rig, two_and_two, until

from kvcore.errors import (
    CancelledByPeerError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    NodeUnavailableError,
    OverloadedError,
)
from kvcore.types import Role
from nodeapi.messages import FinishReason, GenerateRequest, LegInfo, TokenDelta
from nodeapi.sampling import SamplingParams
from router.requests.events import DeadlinePassed, DecodeFailed, DeltaReceived, PrefillDone, TimerFired
from router.requests.ledger import RequestMachine
from router.requests.limits import RequestLimits
from router.requests.run import RequestRun
from router.requests.spec import AnswerRequest, RequestSpec
from router.routing.decision import Decision, Route
from router.routing.policies import least_loaded
from router.routing.views import ClusterView, RouteRequest

PROMPT = [i % 250 for i in range(100)]
IMPATIENT = RequestLimits(patience_s=0.05, retry_pause_s=0.02)


def open_run(
    rig: Rig, *, max_tokens: int = 8, n: int = 1, prompt: list[int] | None = None, name: str = "r"
) -> RequestRun:
    sampling = SamplingParams(max_tokens=max_tokens, n=n, seed=7, temperature=0)
    return rig.dispatcher.open(RequestSpec(name, prompt or PROMPT, sampling))


async def tokens_of(run: RequestRun) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async with run:
        async for emit in run:
            tokens.setdefault(emit.index, []).extend(emit.token_ids)
    return tokens


async def assert_quiet(rig: Rig) -> None:
    await rig.dispatcher.aclose()
    assert rig.log.in_flight == 0
    assert all(node.running == 0 for node in rig.nodes.nodes)
    assert all(node.sequences == 0 and node.prefill_tokens == 0 for node in rig.cluster.nodes.values())


async def test_a_prefiller_that_answers_500_is_replaced_and_only_it_is_charged() -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["p0"].prefill_error = rig.nodes["p1"].prefill_error = EngineError("broken")
    for number in range(6):
        run = open_run(rig, name=f"r{number}")
        assert (await tokens_of(run))[0] == expected(PROMPT, 8)
    assert {rig.cluster.breaker_state(rig.cluster.nodes[p]) for p in ("p0", "p1")} == {"open"}
    assert {rig.cluster.breaker_state(rig.cluster.nodes[d]) for d in ("d0", "d1")} == {"closed"}
    await assert_quiet(rig)


async def test_a_decoder_that_answers_500_never_opens_a_prefillers_breaker() -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["d0"].generate_error = EngineError("broken")
    for number in range(8):
        assert (await tokens_of(open_run(rig, name=f"r{number}")))[0] == expected(PROMPT, 8)
    assert rig.cluster.breaker_state(rig.cluster.nodes["d0"]) == "open"
    assert rig.cluster.breaker_state(rig.cluster.nodes["p0"]) == "closed"
    assert rig.log.retried == 3
    await assert_quiet(rig)


class RaisesFrom:
    """The policy of `least_loaded`, which raises in each choice from this one on."""

    def __init__(self, first: int) -> None:
        self._left, self._real = first, least_loaded.make()

    def choose(self, request: RouteRequest, view: ClusterView) -> Decision:
        self._left -= 1
        if self._left <= 0:
            raise RuntimeError("a policy's bug")
        return self._real.choose(request, view)


@pytest.mark.parametrize("first", [1, 2])
async def test_a_policy_that_raises_fails_no_request_and_hangs_none_that_is_tried_again(
    first: int, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make_rig(policy=RaisesFrom(first))
    for node in (rig.nodes["d0"], rig.nodes["d1"]):
        node.die_after = 3
    async with asyncio.timeout(10):
        assert (await tokens_of(open_run(rig)))[0] == expected(PROMPT, 8)
    assert rig.log.retried == 1 and "a policy's bug" in caplog.text and "policy_failed" in caplog.text
    await assert_quiet(rig)


@pytest.mark.parametrize("event", [Route, DeltaReceived, PrefillDone, DecodeFailed, TimerFired, DeadlinePassed])
async def test_a_bug_of_the_ledger_fails_its_request_at_once_and_leaves_nothing(
    event: type, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, hit = RequestMachine._set_state, 0

    def buggy(self: RequestMachine, happened: object) -> None:
        nonlocal hit
        if type(happened) is event and not hit:
            hit += 1
            raise AssertionError("a bug")
        real(self, happened)  # type: ignore[arg-type]

    rig = await make_rig(limits=IMPATIENT)
    run = open_run(rig, name="buggy")
    if event in (DecodeFailed, TimerFired):
        for node in (rig.nodes["d0"], rig.nodes["d1"]):
            node.die_after = 3
    if event is TimerFired:  # it waits for a node
        for node in rig.nodes.nodes:
            node.stays_dead = node.role is Role.DECODER
            node.down = node.role is Role.PREFILLER
    monkeypatch.setattr(RequestMachine, "_set_state", buggy)
    async with asyncio.timeout(10):
        with pytest.raises(EngineError, match=r"^internal error$"):
            async with run:
                if event is DeadlinePassed:
                    run.cut(DeadlineExceededError("its time is up"))
                async for _ in run:
                    pass
    assert hit == 1 and "request_crashed id=buggy" in caplog.text and "a bug" in caplog.text
    assert rig.log.failed == 1
    await until(lambda: all(node.running == 0 for node in rig.nodes.nodes))
    await assert_quiet(rig)


async def test_without_prefillers_left_the_decoder_is_told_to_compute() -> None:
    rig = await make_rig(limits=IMPATIENT)
    for name in ("p0", "p1"):
        rig.nodes[name].prefill_error = NodeUnavailableError("killed")
    for name in ("d0", "d1"):
        rig.nodes[name].wait_for_handoff = True
    run = open_run(rig)
    assert (await tokens_of(run))[0] == expected(PROMPT, 8)
    await rig.dispatcher.aclose()
    assert rig.nodes["d0"].handoffs_ended + rig.nodes["d1"].handoffs_ended == ["r.d2"]
    assert [leg.error is not None for leg in run.record.legs if leg.kind == "prefill"] == [True, True]


async def test_a_prefill_that_found_no_room_is_noted_and_the_decoder_computes() -> None:
    rig = await make_rig(limits=IMPATIENT)
    for node in rig.nodes.nodes:
        node.no_room = node.wait_for_handoff = True
    run = open_run(rig)
    assert (await tokens_of(run))[0] == expected(PROMPT, 8)
    await rig.dispatcher.aclose()
    notes = [(leg.kind, leg.note, leg.error, leg.computed_tokens) for leg in run.record.legs]
    assert notes == [("prefill", "no_room", None, 0), ("decode", None, None, 1)], "nor is it tried elsewhere"


async def test_the_end_of_a_handoff_that_overtakes_its_leg_is_said_again() -> None:
    rig = await make_rig(limits=RequestLimits(handoff_grace_s=0.01))
    for node in rig.nodes.nodes:
        node.prefill_error = NodeUnavailableError("killed")
        node.wait_for_handoff, node.deaf_to_handoffs = True, 2
    async with asyncio.timeout(60):
        assert (await tokens_of(open_run(rig)))[0] == expected(PROMPT, 8)


@pytest.mark.parametrize("die_after", [0, 1, 5])
async def test_a_dying_decoder_is_continued_elsewhere_without_gap_or_repeat(die_after: int) -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["d0"].die_after = die_after
    for number in range(2):
        run = open_run(rig, name=f"r{number}")
        assert (await tokens_of(run))[0] == expected(PROMPT, 8)
    continued = [request.output_token_ids for request in rig.nodes["d1"].generates]
    assert expected(PROMPT, die_after) in continued
    await assert_quiet(rig)


async def test_three_completions_are_each_continued_by_their_own_leg() -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["d0"].die_after = 4
    rig.nodes["d0"].tokens = rig.nodes["d1"].tokens = lambda tokens, index: 97 + len(tokens) % 26  # as greedy: the same
    rig.nodes["d1"].down = True
    await rig.prober.probe()
    run = open_run(rig, n=3, max_tokens=5)
    rig.nodes["d1"].down = False
    await rig.prober.probe()
    tokens = await tokens_of(run)
    assert tokens == {i: [97 + (100 + k) % 26 for k in range(5)] for i in range(3)}
    seeds = [request.sampling.seed for request in rig.nodes["d1"].generates]
    assert len(seeds) == len(set(seeds)) == 3
    assert all(request.sampling.n == 1 for request in rig.nodes["d1"].generates)
    await assert_quiet(rig)


async def test_a_request_waits_for_its_only_decoder_to_come_back() -> None:
    nodes = FakeNodes([FakeNode("d0", Role.DECODER)])
    rig = await make_rig(nodes, limits=RequestLimits(patience_s=0.05, retry_pause_s=0.01))
    node = nodes["d0"]
    node.die_after = 3
    run = open_run(rig)

    async def restart() -> None:
        await until(lambda: bool(run.machine.retries))
        node.die_after = None

    restarting = asyncio.create_task(restart())
    assert (await tokens_of(run))[0] == expected(PROMPT, 8)
    await restarting
    assert run.record.retries == 1


@pytest.mark.parametrize(
    "script",
    [
        [TokenDelta(index=3, token_ids=[1])],
        [TokenDelta(token_ids=[1] * 99)],
        [TokenDelta(token_ids=[1])],
        [],
    ],
    ids=["unknown index", "over max_tokens", "ends early", "empty"],
)
async def test_a_decoder_that_breaks_the_protocol_is_an_error_not_a_hang(script: list[TokenDelta]) -> None:
    rig = await make_rig(limits=IMPATIENT)
    for node in rig.nodes.nodes:
        node.script = script
    with pytest.raises((EngineError, NodeUnavailableError)):
        async with asyncio.timeout(60):
            await tokens_of(open_run(rig, max_tokens=16))
    assert rig.log.failed == 1
    await assert_quiet(rig)


async def test_a_request_that_is_wrong_is_not_tried_again() -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["d0"].generate_error = rig.nodes["d1"].generate_error = InvalidRequestError("no")
    with pytest.raises(InvalidRequestError):
        await tokens_of(open_run(rig))
    assert len(rig.nodes["d0"].generates) + len(rig.nodes["d1"].generates) == 1


async def test_all_decoders_full_is_said_at_once() -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["d0"].generate_error = rig.nodes["d1"].generate_error = OverloadedError("full")
    with pytest.raises(OverloadedError):
        await tokens_of(open_run(rig))
    assert rig.cluster.breaker_state(rig.cluster.nodes["d0"]) == "closed"


async def test_the_deadline_cancels_both_legs() -> None:
    rig = await make_rig(request_timeout_s=0.05, limits=IMPATIENT)
    for node in rig.nodes.nodes:
        node.prefill_gate = node.generate_gate = asyncio.Event()
    run = open_run(rig)
    with pytest.raises(DeadlineExceededError):
        await tokens_of(run)
    await rig.dispatcher.aclose()
    assert sorted(leg for node in rig.nodes.nodes for leg in node.aborted) == ["r.d2", "r.p1"]
    await assert_quiet(rig)


async def test_a_client_that_leaves_cancels_both_legs_at_once() -> None:
    rig = await make_rig(limits=IMPATIENT)
    for node in rig.nodes.nodes:
        node.prefill_gate = asyncio.Event()
    run = open_run(rig, max_tokens=200)
    async with run:
        async for _ in run:
            break
    await rig.dispatcher.aclose()
    assert run.record.state == "cancelled"
    assert sorted(leg for node in rig.nodes.nodes for leg in node.aborted) == ["r.d2", "r.p1"]
    await assert_quiet(rig)


async def test_a_stop_ends_one_completion_and_the_last_one_the_request() -> None:
    rig = await make_rig(limits=IMPATIENT)
    run = open_run(rig, n=2, max_tokens=50)
    seen: list[int] = []
    async with run:
        async for emit in run:
            seen.append(emit.index)
            run.stop(emit.index, 1)
    assert seen == [0, 1]
    assert (run.record.state, run.record.completion_tokens) == ("ok", 2)
    await assert_quiet(rig)


class StoppedInBetween(FakeNode):
    """Its second completion ends after the client's stop of the first, which the abort that follows ends."""

    async def _deltas(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        yield TokenDelta(index=0, token_ids=[1], info=LegInfo(cached_tokens=0, computed_tokens=1))
        for _ in range(5):
            await asyncio.sleep(0)
        yield TokenDelta(index=1, token_ids=[2], finish_reason=FinishReason.LENGTH)
        yield TokenDelta(index=0, finish_reason=FinishReason.ABORT)


async def test_what_a_leg_says_once_we_ended_it_is_not_held_against_its_node() -> None:
    rig = await make_rig(FakeNodes([StoppedInBetween("d0", Role.DECODER)]), limits=IMPATIENT)
    for number in range(4):
        run = open_run(rig, n=2, name=f"r{number}")
        async with run:
            async for emit in run:
                if emit.index == 0:
                    run.stop(0, 1)
        await rig.dispatcher.aclose()
        assert [leg.error for leg in run.record.legs] == [None]
    assert rig.cluster.breaker_state(rig.cluster.nodes["d0"]) == "closed"
    await assert_quiet(rig)


async def test_a_node_that_cancels_what_we_want_is_replaced() -> None:
    rig = await make_rig(limits=IMPATIENT)
    rig.nodes["d0"].generate_error = CancelledByPeerError("aborted by hand")
    for number in range(2):
        assert (await tokens_of(open_run(rig, name=f"r{number}")))[0] == expected(PROMPT, 8)
    assert (rig.log.ok, rig.log.cancelled, rig.log.retried) == (2, 0, 1)


async def test_more_requests_than_the_bound_are_refused() -> None:
    rig = await make_rig(max_requests=1, limits=IMPATIENT)
    async with open_run(rig):
        with pytest.raises(OverloadedError):
            open_run(rig, name="r2")


async def test_prompts_of_one_request_count_against_the_bound_together() -> None:
    rig = await make_rig(max_requests=2, limits=IMPATIENT)
    specs = [RequestSpec(f"r-{number}", [97], SamplingParams(max_tokens=4)) for number in range(3)]
    with pytest.raises(OverloadedError):
        rig.answerer.start(AnswerRequest(specs))


async def test_a_decoder_whose_context_is_too_short_for_prompt_and_completion_is_not_asked() -> None:
    rig = await make_rig(limits=IMPATIENT)
    for name in ("d0", "p0"):
        node = rig.cluster.nodes[name]
        assert node.report is not None and node.report.engine is not None
        engine = msgspec.structs.replace(node.report.engine, max_context=len(PROMPT) - 1 if name == "p0" else 107)
        node.report = msgspec.structs.replace(node.report, engine=engine)
    for number in range(4):
        assert (await tokens_of(open_run(rig, name=f"r{number}")))[0] == expected(PROMPT, 8)
    assert not rig.nodes["d0"].generates and not rig.nodes["p0"].prefills


async def test_an_answer_that_is_whole_when_time_is_up_is_an_answer() -> None:
    rig = await make_rig(request_timeout_s=0.2, limits=IMPATIENT)
    for name in ("p0", "p1"):
        rig.nodes[name].prefill_gate = asyncio.Event()
    run = open_run(rig)
    assert (await tokens_of(run))[0] == expected(PROMPT, 8)
    assert run.record.state == "ok"
    await assert_quiet(rig)


async def test_no_decoder_ready_says_why() -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.down = True
    rig = await make_rig(nodes, limits=IMPATIENT)
    with pytest.raises(NodeUnavailableError, match="d0: d0 refused the connection"):
        open_run(rig)


async def test_nodes_of_other_weights_are_never_paired() -> None:
    nodes = two_and_two()
    for name in ("p0", "p1"):
        nodes[name].weights = "other"
    rig = await make_rig(nodes, limits=IMPATIENT)
    run = open_run(rig)
    await tokens_of(run)
    assert run.record.route is not None and run.record.route.reason == "other_kv: weights"


async def test_both_legs_start_together_and_cached_tokens_is_the_prefillers_truth() -> None:
    rig = await make_rig(limits=IMPATIENT)
    for name, cached in (("p0", 64), ("p1", 64), ("d0", 96), ("d1", 96)):
        rig.nodes[name].cached_tokens = cached
    run = open_run(rig)
    assert (await tokens_of(run))[0] == expected(PROMPT, 8)
    assert run.record.cached_tokens == 64
    (generate,) = rig.nodes["d0"].generates + rig.nodes["d1"].generates
    assert generate.handoff is not None and generate.handoff.num_chunks == (len(PROMPT) - 1) // CHUNK_TOKENS
    (prefill,) = rig.nodes["p0"].prefills + rig.nodes["p1"].prefills
    assert prefill.prefer_segment in ("d0.1", "d1.1")
    assert rig.log.hit_rate == 0.64


async def test_a_slow_client_holds_its_node_back_and_loses_nothing() -> None:
    rig = await make_rig(limits=IMPATIENT)
    run = open_run(rig, max_tokens=1000)
    tokens: list[int] = []
    async with run:
        for _ in range(600):
            await asyncio.sleep(0)
        assert len(run.outputs) <= 257
        async for emit in run:
            tokens += emit.token_ids
    assert tokens == expected(PROMPT, 1000)
