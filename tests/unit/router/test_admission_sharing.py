"""What a router's admission is told by others, and what it tells: shares, turns, bounds. Pure but for the route."""

from collections.abc import Mapping

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from support.router_fakes import make_rig

from kvcore.clock import ManualClock
from kvcore.errors import InvalidRequestError
from router.admission.fair_queue import FairQueue, Waiter
from router.admission.limits import AdmissionLimits
from router.admission.sharing import AdmissionReport, FlowUse, NodeUse, SharedAdmission, fair_level
from router.processes.exchange import LOAD, add_load
from router.tenants.paths import is_operators_path


class Side:
    """One router's, without a router."""

    def __init__(self, *, expected: int = 1, places: int = 10, clock: ManualClock | None = None) -> None:
        self.clock, self.running = clock or ManualClock(), dict[str, int]()
        self.queue = FairQueue(100)
        self.nodes: Mapping[str, NodeUse] | None = {}
        self.woken = self.pushed = 0
        self.shared = SharedAdmission(
            self.clock,
            expected=expected,
            running=lambda: self.running,
            nodes=lambda: {},
            places=lambda: places,
            tell_nodes=self.told_nodes,
            limits=AdmissionLimits(max_routers=2),
        )
        self.shared.serve(self.queue, self.wake)
        self.shared.on_change.append(self.push)

    def told_nodes(self, nodes: Mapping[str, NodeUse] | None) -> None:
        self.nodes = nodes

    def wake(self) -> None:
        self.woken += 1

    def push(self) -> None:
        self.pushed += 1


def said(
    router: str = "b",
    first: tuple[int, float] | None = None,
    now: float = 0.0,
    *,
    flows: dict[str, FlowUse] | None = None,
    nodes: dict[str, NodeUse] | None = None,
) -> AdmissionReport:
    return AdmissionReport(router, now, first, flows or {}, nodes or {})


@pytest.mark.parametrize(
    ("wanted", "level"),
    [([], float("inf")), ([3, 4], float("inf")), ([9, 9], 5.0), ([2, 90], 8.0), ([1, 3, 7], 6.0), ([90, 1, 90], 4.5)],
)
def test_who_wants_less_leaves_the_rest_to_the_others(wanted: list[int], level: float) -> None:
    assert fair_level(wanted, 10) == level


def test_a_flow_within_its_share_of_the_places_waits_for_none() -> None:
    side = Side()
    side.running = {"mine": 2}
    side.shared.told(said(flows={"theirs": FlowUse(0.0, 9, 30)}))
    assert side.shared.has_share("mine", 3) and not side.shared.has_share("mine", 4)
    side.shared.told(said(flows={"theirs": FlowUse(0.0, 9, 30), "mine": FlowUse(0.0, 2, 0)}))
    assert side.shared.has_share("mine", 1) and not side.shared.has_share("mine", 2), "what it has there counts"


def test_while_others_are_not_heard_a_router_counts_on_its_own_part() -> None:
    side = Side(expected=3, places=12)
    side.running = {"a": 2}
    assert side.shared.has_share("a", 1) and not side.shared.has_share("a", 2)
    assert side.shared.problem() == (
        "3 of 3 other routers and processes say nothing of their load: this one counts on 1/4 of the places"
    )
    assert not Side(expected=0).shared.has_share("a", 1) and not Side(places=0).shared.has_share("a", 1)


def test_turns_are_taken_over_all_routers_and_nobody_is_waited_for_for_long() -> None:
    side = Side()
    side.shared.told(said(first=(1, 5.0)))
    assert side.shared.comes_first((1, 5.0)) and side.shared.comes_first((0, 9.0))
    assert not side.shared.comes_first((1, 5.1)) and not side.shared.comes_first((2, 0.0))
    for _ in range(3):
        side.clock.advance(0.2)
        side.shared.told(said(first=(1, 5.0)))
    assert side.shared.comes_first((1, 5.1)), "it waits for something else"
    side.shared.told(said(first=(1, 4.0)))
    assert not side.shared.comes_first((1, 5.1))
    side.clock.advance(1.6)
    assert side.shared.comes_first((1, 5.1)), "that router is not heard any more"


def test_what_a_flow_was_charged_elsewhere_counts_once() -> None:
    side = Side()
    side.queue.passed("t", 10.0)
    before = side.queue.start_of("t")
    for charged in (100.0, 130.0, 130.0):
        side.shared.told(said(flows={"t": FlowUse(charged)}))
    assert side.queue.start_of("t") == before + 30.0, "what was before it was heard is not counted"
    side.shared.told(said(flows={"t": FlowUse(120.0)}))
    assert side.queue.start_of("t") == before + 20.0, "some of it left without a turn"
    side.shared.told(said(now=500.0))
    assert side.queue.now == 500.0 and side.woken == 4, "what is said again wakes nobody"


def test_it_tells_who_waits_and_what_each_flow_had() -> None:
    side = Side()
    side.queue.passed("a", 7.0)
    waiter = Waiter("b", 1, 3.0, 3, 2)
    side.queue.add(waiter)
    side.running = {"a": 1}
    report = side.shared.report()
    assert report.flows == {"a": FlowUse(7.0, 1, 0), "b": FlowUse(3.0, 0, 2)}
    assert report.first == waiter.order[:2]
    side.queue.leave(waiter)
    side.pushed = 0
    side.shared.changed()
    assert side.pushed == 1, "nobody is to wait for who has left"
    assert side.shared.report().first is None
    side.shared.changed()
    assert side.pushed == 1, "nobody waits anywhere"
    assert side.shared.report().flows["b"].charged == 0.0


def test_the_others_work_is_that_of_all_and_ends_with_the_first_that_is_not_heard() -> None:
    side = Side(expected=2)
    side.shared.told(said("b", nodes={"d0": NodeUse(2, 10)}))
    assert side.nodes == {}, "not all are heard"
    side.shared.told(said("c", nodes={"d0": NodeUse(1, 5), "d1": NodeUse(1, 0)}))
    assert side.nodes == {"d0": NodeUse(3, 15), "d1": NodeUse(1, 0)}
    assert side.shared.problem() is None
    side.clock.advance(1.0)
    side.shared.told(said("c"))
    side.clock.advance(1.0)
    side.shared.report()
    assert side.nodes is None


def test_a_router_does_not_hear_itself_and_routers_are_bounded() -> None:
    side = Side(expected=2)
    side.shared.told(said(side.shared.name, first=(0, 0.0)))
    assert side.shared.heard == 0
    for name in "bc":
        side.shared.told(said(name))
    with pytest.raises(InvalidRequestError, match="more than 2 routers"):
        side.shared.told(said("d"))
    side.clock.advance(2.0)
    side.shared.told(said("d"))
    assert side.shared.heard == 1


async def test_reports_come_by_a_route_of_operators() -> None:
    side, app = Side(), FastAPI()
    add_load(app, side.shared)
    assert is_operators_path("POST", LOAD)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://r") as http:
        reply = await http.post(LOAD, content=msgspec.msgpack.encode(said(first=(1, 2.0))))
        assert reply.status_code == 200 and not side.shared.comes_first((1, 3.0))
        with pytest.raises(InvalidRequestError, match="no report of a router's load"):
            await http.post(LOAD, content=msgspec.msgpack.encode({"router": 1}))


async def test_who_is_not_heard_is_one_of_the_clusters_problems() -> None:
    rig, side = await make_rig(), Side()
    rig.view._status.problems_beside.append(side.shared.problem)
    assert any("say nothing of their load" in line for line in (await rig.view.cluster()).problems)
    side.shared.told(said())
    assert not any("say nothing of their load" in line for line in (await rig.view.cluster()).problems)
