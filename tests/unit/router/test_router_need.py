"""Where no decoder can, a prefiller decodes: the rest of a stream in its midst, and new requests alike."""

import asyncio

import httpx
import msgspec
import pytest
from support.router_fakes import FakeNode, FakeNodes, Rig, expected, make_rig, until

from kvcore.errors import EngineError, NodeUnavailableError, OverloadedError
from kvcore.types import Role
from nodeapi.sampling import SamplingParams
from router.nodes.limits import NodeHealthLimits
from router.requests.limits import RequestLimits
from router.requests.records import RequestRecord
from router.requests.run import RequestRun
from router.requests.spec import RequestSpec
from router.status import ClusterStatus

PROMPT = [i % 250 for i in range(100)]
SHORT = RequestLimits(patience_s=0.05, retry_pause_s=0.02)


def nodes(*names: str) -> FakeNodes:
    return FakeNodes([FakeNode(name, Role.PREFILLER if name[0] == "p" else Role.DECODER) for name in names])


def open_run(rig: Rig, name: str = "r", *, max_tokens: int = 8, n: int = 1) -> RequestRun:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, n=n)
    return rig.dispatcher.open(RequestSpec(name, PROMPT, sampling))


async def answer(run: RequestRun) -> RequestRecord:
    """Its record, when all of its tokens have come and are right."""
    tokens: dict[int, list[int]] = {}
    async with run:
        async for emit in run:
            tokens.setdefault(emit.index, []).extend(emit.token_ids)
    assert tokens[0] == expected(PROMPT, len(tokens[0]))
    return run.record


async def status(rig: Rig) -> ClusterStatus:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        return msgspec.json.decode((await client.get("/v1/cluster")).content, type=ClusterStatus)


def decoded_by(record: RequestRecord) -> list[tuple[str, bool]]:
    return [(leg.node, leg.in_need) for leg in record.legs if leg.kind == "decode"]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_whose_only_decoder_dies_goes_on_at_the_prefiller(n: int) -> None:
    rig = await make_rig(nodes("p0", "d0"), limits=SHORT)
    rig.nodes["d0"].die_after, rig.nodes["d0"].stays_dead = 3 * n, True
    record = await answer(open_run(rig, n=n))
    assert decoded_by(record) == [("d0", False), *[("p0", True)] * n]
    assert record.state == "ok" and record.in_need and record.retries == 1
    shown = await status(rig)
    assert shown.requests.in_need == 1


async def test_new_requests_go_to_the_prefiller_until_a_decoder_is_back() -> None:
    rig = await make_rig(nodes("p0", "p1", "d0"))
    rig.nodes["d0"].down = True
    await rig.prober.probe()
    records = [await answer(open_run(rig, f"r{number}")) for number in range(4)]
    assert {node for record in records for node, _ in decoded_by(record)} == {"p0", "p1"}, "they share the work"
    assert rig.log.newest() == records[::-1]
    for record in records:
        assert record.route is not None and (record.route.prefiller, record.route.reason) == (None, "in_need")
        assert {item.node for item in record.route.candidates} == {"p0", "p1"}
        assert [item.node for item in record.route.left_out] == ["d0"]
    shown = await status(rig)
    assert shown.requests.in_need == 4
    (problem,) = shown.problems
    assert problem.startswith("no decoder can be used, so prefillers decode until one is back (d0: ")
    rig.nodes["d0"].down = False
    await rig.prober.probe()
    assert decoded_by(await answer(open_run(rig, "r9"))) == [("d0", False)]
    assert (await status(rig)).problems == []


async def test_a_cluster_whose_decoder_has_not_started_yet_serves() -> None:
    fakes = nodes("p0", "d0")
    fakes["d0"].down = True
    rig = await make_rig(fakes)
    assert rig.answerer.max_context == fakes["p0"].max_context
    assert decoded_by(await answer(open_run(rig))) == [("p0", True)]


async def test_a_decoder_that_is_full_is_no_need() -> None:
    rig = await make_rig(nodes("p0", "d0"), limits=SHORT)
    rig.nodes["d0"].generate_error = OverloadedError("full")
    with pytest.raises(OverloadedError):
        await answer(open_run(rig))
    assert not rig.nodes["p0"].generates


async def test_a_prefiller_that_is_full_leaves_it_to_the_next() -> None:
    rig = await make_rig(nodes("p0", "p1", "d0"), limits=SHORT)
    rig.nodes["d0"].down = True
    rig.nodes["p0"].generate_error = OverloadedError("full")
    await rig.prober.probe()
    for number in range(4):
        assert decoded_by(await answer(open_run(rig, f"r{number}")))[-1] == ("p1", True)


async def test_who_stands_in_may_die_too_and_the_first_that_is_back_goes_on() -> None:
    rig = await make_rig(nodes("p0", "d0"), limits=RequestLimits(patience_s=60.0, retry_pause_s=0.01))
    for name in ("p0", "d0"):
        rig.nodes[name].die_after, rig.nodes[name].stays_dead = 3, True
    task = asyncio.create_task(answer(run := open_run(rig, max_tokens=12)))
    await until(lambda: rig.nodes["p0"].down)
    await rig.prober.probe()
    assert not task.done()
    with pytest.raises(NodeUnavailableError, match=r"no node can decode \(d0: .*; p0: "):
        open_run(rig, "other")
    rig.nodes["d0"].down, rig.nodes["d0"].die_after = False, None
    await rig.prober.probe()
    record = await task
    assert decoded_by(record) == [("d0", False), ("p0", True), ("d0", False)] and run.machine.completion_tokens == 12


async def test_a_prefiller_that_hangs_while_it_stands_in_is_given_up() -> None:
    rig = await make_rig(nodes("p0", "d0"), node_limits=NodeHealthLimits(lost_rounds=0))
    rig.nodes["d0"].down = True
    await rig.prober.probe()
    rig.nodes["p0"].generate_gate = asyncio.Event()
    task = asyncio.create_task(answer(open_run(rig)))
    await until(lambda: bool(rig.nodes["p0"].generates))
    rig.nodes["p0"].down, rig.nodes["d0"].down = True, False
    await rig.prober.probe()
    assert decoded_by(await task) == [("p0", True), ("d0", False)]


async def test_a_prefill_leg_under_way_is_no_hindrance() -> None:
    """Its decoder dies while it computes: it goes on, and the prefiller decodes from what it has."""
    rig = await make_rig(nodes("p0", "d0"))
    gate = rig.nodes["p0"].prefill_gate = asyncio.Event()
    rig.nodes["d0"].generate_error = EngineError("broken")
    task = asyncio.create_task(answer(open_run(rig)))
    await until(lambda: bool(rig.nodes["p0"].generates))
    assert rig.nodes["p0"].generates[0].handoff is not None, "it may wait for what is being computed"
    gate.set()
    assert decoded_by(await task) == [("d0", False), ("p0", True)]


def test_patience_is_the_time_that_a_node_needs_to_start() -> None:
    limits = RequestLimits()
    assert limits.waiting_for_start(1800.0).patience_s == 1800.0
    assert limits.waiting_for_start(1.0).patience_s == limits.patience_s
