"""A host that hangs breaks no connection: its legs are given up once it has answered no probe for long enough."""

import asyncio

import pytest
from support.router_fakes import FakeNode, Rig, expected, make_rig, until

from kvcore.clock import ManualClock
from kvcore.config.schema import RouterConfig
from kvcore.errors import EngineError, NodeUnavailableError
from kvcore.types import NodeInfo, Role
from metadata_server.messages import Event, EventKind
from nodeapi.sampling import SamplingParams
from router.nodes.limits import NodeHealthLimits
from router.requests.run import RequestRun
from router.requests.spec import RequestSpec

PROMPT = [i % 250 for i in range(100)]
UP = Event(
    seq=1,
    kind=EventKind.NODE_UP,
    node_id="d0",
    node=NodeInfo(id="d0", role=Role.DECODER, control_url="", incarnation=1),
)
DOWN = Event(seq=2, kind=EventKind.NODE_DOWN, node_id="d0")


def open_run(rig: Rig) -> RequestRun:
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return rig.dispatcher.open(RequestSpec("r", PROMPT, sampling))


async def tokens_of(run: RequestRun) -> list[int]:
    async with run:
        return [token async for emit in run for token in emit.token_ids]


async def assert_quiet(rig: Rig) -> None:
    await until(lambda: all(node.running == 0 for node in rig.nodes.nodes))
    assert rig.log.in_flight == 0 and not rig.dispatcher.running


def decode_legs(run: RequestRun) -> list[str]:
    return [leg.node for leg in run.record.legs if leg.kind == "decode"]


@pytest.fixture
async def rig() -> Rig:
    """Lost with the first probe that has no answer."""
    return await make_rig(node_limits=NodeHealthLimits(lost_rounds=0))


def hang(node: FakeNode) -> None:
    """Legs and probes have no answer from here on; nothing breaks off."""
    node.prefill_gate = node.generate_gate = asyncio.Event()
    node.down = True


async def test_a_prefill_on_a_node_that_hangs_is_done_by_another(rig: Rig) -> None:
    for name in ("d0", "d1"):
        rig.nodes[name].wait_for_handoff = True
    run = open_run(rig)
    first = run.record.route.prefiller if run.record.route else None
    assert first is not None
    node = rig.nodes[first]
    node.prefill_gate = asyncio.Event()
    task = asyncio.create_task(tokens_of(run))
    await until(lambda: len(node.prefills) == 1)
    hang(node)
    await rig.prober.probe()
    assert await task == expected(PROMPT, 8)
    assert run.record.retried_legs == [("prefill", "node_unavailable")]
    legs = [leg for leg in run.record.legs if leg.kind == "prefill"]
    assert [leg.node for leg in legs] == [first, *({"p0", "p1"} - {first})]
    assert "answered nothing" in (legs[0].error or "")
    await assert_quiet(rig)


async def test_a_prefill_is_moved_as_soon_as_its_node_is_silent_where_another_one_is_there() -> None:
    """By the first probe without an answer; a decode leg, which has more to lose, waits until the node is lost."""
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.wait_for_handoff = node.id[0] == "d"
        node.prefill_gate = asyncio.Event() if node.id[0] == "p" else None
    run = open_run(rig)
    route = run.record.route
    assert route is not None and route.prefiller is not None
    task = asyncio.create_task(tokens_of(run))
    first, decoder = rig.nodes[route.prefiller], rig.nodes[route.decoder]
    await until(lambda: len(first.prefills) == len(decoder.generates) == 1)
    first.down = decoder.down = True
    await rig.prober.probe()
    (other,) = {"p0", "p1"} - {first.id}
    await until(lambda: len(rig.nodes[other].prefills) == 1)
    assert len(decoder.generates) == 1 and len(run.record.legs) == 3
    rig.nodes[other].down = True
    await rig.prober.probe()
    assert len(run.record.legs) == 3, "there is no third one: it may come to itself"
    gate = rig.nodes[other].prefill_gate
    assert gate is not None
    gate.set()
    assert await task == expected(PROMPT, 8)
    assert run.record.retried_legs == [("prefill", "node_unavailable")]
    await assert_quiet(rig)


async def test_a_decode_on_a_node_that_hangs_goes_on_elsewhere(rig: Rig) -> None:
    run = open_run(rig)
    assert run.record.route is not None
    node = rig.nodes[run.record.route.decoder]
    node.generate_gate = asyncio.Event()
    task = asyncio.create_task(tokens_of(run))
    await until(lambda: len(node.generates) == 1)
    hang(node)
    for _ in range(3):  # it stays silent: said again, and nothing happens twice
        await rig.prober.probe()
    assert await task == expected(PROMPT, 8)
    assert run.record.retries == 1 and run.record.legs[-1].node != node.id
    await assert_quiet(rig)


async def test_nodes_that_are_lost_one_after_the_other_are_no_tries_of_a_request_which_waits_for_one() -> None:
    rig = await make_rig(node_limits=NodeHealthLimits(lost_rounds=0), attempts=2)
    for node in rig.nodes.nodes:
        node.generate_gate = asyncio.Event()
    run = open_run(rig)
    task = asyncio.create_task(tokens_of(run))
    for number in range(1, 5):
        await until(lambda number=number: len(decode_legs(run)) == number)
        rig.nodes[decode_legs(run)[-1]].down = True
        await rig.prober.probe()
    assert sorted(decode_legs(run)) == ["d0", "d1", "p0", "p1"] and not task.done()
    node = rig.nodes["d0"]
    node.down, node.generate_gate = False, None
    await rig.prober.probe()
    assert await task == expected(PROMPT, 8)
    assert run.record.retries == 4
    await assert_quiet(rig)


async def test_a_request_whose_nodes_all_die_under_it_waits_for_the_first_that_is_back() -> None:
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.die_after, node.stays_dead = 0, True
    run = open_run(rig)
    task = asyncio.create_task(tokens_of(run))
    await until(lambda: all(node.down for node in rig.nodes.nodes))
    await rig.prober.probe()
    node = rig.nodes["d0"]
    node.down, node.die_after = False, None
    await rig.prober.probe()
    assert await task == expected(PROMPT, 8)
    assert sorted(decode_legs(run)[:4]) == ["d0", "d1", "p0", "p1"] and decode_legs(run)[4:] == ["d0"]
    await assert_quiet(rig)


async def test_a_request_that_kills_every_node_is_tried_once_more_and_fails() -> None:
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.die_after = 0
    run = open_run(rig)
    with pytest.raises(NodeUnavailableError):
        await tokens_of(run)
    assert len(decode_legs(run)) == RouterConfig().attempts + 1
    await assert_quiet(rig)


async def test_a_prefill_into_a_node_that_hangs_is_not_waited_for(rig: Rig) -> None:
    for name in ("d0", "d1"):
        rig.nodes[name].wait_for_handoff = True
    run = open_run(rig)
    route = run.record.route
    assert route is not None and route.prefiller is not None
    prefiller, decoder = rig.nodes[route.prefiller], rig.nodes[route.decoder]
    prefiller.prefill_gate = asyncio.Event()  # it would write until its transport gives up
    task = asyncio.create_task(tokens_of(run))
    await until(lambda: len(prefiller.prefills) == len(decoder.generates) == 1)
    hang(decoder)
    await rig.prober.probe()
    assert await task == expected(PROMPT, 8)
    assert run.record.retried_legs == [("decode", "node_unavailable"), ("prefill", "engine_error")]
    (other,) = {"d0", "d1"} - {decoder.id}
    (again,) = rig.nodes[next(iter({"p0", "p1"} - {prefiller.id}))].prefills
    assert again.prefer_segment == f"{other}.1"
    await assert_quiet(rig)


async def test_a_node_that_answers_anything_in_time_is_not_lost() -> None:
    rig = await make_rig()
    clock, lost = ManualClock(), list[str]()
    rig.cluster._clock = rig.prober._clock = clock
    rig.prober.on_lost.append(lambda node, error: lost.append(node))
    node = rig.nodes["d0"]

    async def silent_for(seconds: float) -> None:
        node.down = True
        await rig.prober.probe()
        clock.advance(seconds)
        await rig.prober.probe()

    await silent_for(8.9)
    node.down = False
    await rig.prober.probe()
    await silent_for(8.9)
    assert lost == []
    clock.advance(0.2)
    await rig.prober.probe()
    assert lost == ["d0"]


class Watched:
    """A cluster whose clock we turn, and whom it has given up."""

    def __init__(self, rig: Rig) -> None:
        self.cluster, self.prober, self.node = rig.cluster, rig.prober, rig.nodes["d0"]
        self.clock = self.cluster._clock = self.prober._clock = ManualClock()
        self.lost: list[str] = []
        self.prober.on_lost.append(lambda node, error: self.lost.append(f"{node}: {error.message}"))

    async def later(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.prober.probe()


async def test_a_silent_node_whose_lease_has_ended_is_lost_sooner() -> None:
    watched = Watched(await make_rig())
    watched.cluster.on_events([UP, DOWN])
    watched.node.down = True
    await watched.prober.probe()
    await watched.later(2.9)
    assert watched.lost == []
    await watched.later(0.2)
    assert watched.lost == ["d0: node d0 has answered nothing for 3 s, its lease has ended"]


async def test_a_node_that_answers_is_not_lost_whatever_its_lease() -> None:
    watched = Watched(await make_rig())
    watched.cluster.on_events([UP, DOWN])
    for _ in range(10):  # one probe of two is lost on its way
        watched.node.down = not watched.node.down
        await watched.later(2.9)
    assert watched.lost == []


@pytest.mark.parametrize("heard", ["nothing", "up", "down, up", "down, reset"])
async def test_a_silent_node_of_whose_lease_nothing_is_known_is_lost_later(heard: str) -> None:
    watched = Watched(await make_rig())
    for word in heard.split(", "):
        if word == "reset":  # another life of the metadata server, which knows nobody yet
            watched.cluster.on_reset()
        elif word != "nothing":
            watched.cluster.on_events([UP if word == "up" else DOWN])
    watched.node.down = True
    await watched.prober.probe()
    await watched.later(8.9)
    assert watched.lost == []
    await watched.later(0.2)
    assert watched.lost == ["d0: node d0 has answered nothing for 9 s"]


async def test_an_error_is_an_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    rig.prober.on_lost.append(lambda node, error: lost.append(node))

    def refuse() -> None:
        raise EngineError("no report today")

    monkeypatch.setattr(rig.nodes["d0"], "_check", refuse)
    await rig.prober.probe()
    assert lost == [] and rig.cluster.nodes["d0"].problem == "no report today"
