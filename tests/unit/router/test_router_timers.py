"""The timers of requests that share one of the loop: when they tell, in which order, and what cancels them."""

import asyncio
import random

import pytest
from support.sim_loop import run_sim

from router.requests.events import ClientGone, RequestEvent
from router.requests.flow.timers import RequestTimers, RunningTimer

STEP_S = 0.02


class Told:
    """A request that notes when it is told, and does what it is to do then."""

    def __init__(self, name: int = 0) -> None:
        self.name = name
        self.at: list[float] = []
        self.then = lambda: None

    def tell(self, event: RequestEvent) -> None:
        self.at.append(asyncio.get_running_loop().time())
        self.then()


def test_nobody_is_told_early_or_more_than_a_step_late() -> None:
    async def go() -> None:
        timers, draws = RequestTimers(STEP_S), random.Random(4)
        loop = asyncio.get_running_loop()
        wanted: list[tuple[Told, float]] = []
        for _ in range(500):
            after_s = draws.choice([0.0, 0.25, 0.01, 1.0, draws.uniform(0, 3)])
            wanted.append((told := Told(), loop.time() + after_s))
            timers.start(told, ClientGone(), after_s)
            if draws.random() < 0.3:
                await asyncio.sleep(draws.uniform(0, 0.05))
        await asyncio.sleep(4)
        assert repr(timers) == "<RequestTimers 0 run>"
        for told, when in wanted:
            assert len(told.at) == 1 and -1e-9 <= told.at[0] - when <= STEP_S + 1e-9

    run_sim(go)


def test_what_is_cancelled_is_not_told_and_cancelling_twice_or_late_is_nothing() -> None:
    async def go() -> None:
        timers = RequestTimers(STEP_S)
        told = [Told(number) for number in range(6)]
        started = [timers.start(one, ClientGone(), 0.1 * (1 + one.name % 2)) for one in told]
        for timer in [*started[:3], *started[:3]]:
            timers.cancel(timer)
        assert repr(timers) == "<RequestTimers 3 run>"
        await asyncio.sleep(1)
        assert [len(one.at) for one in told] == [0, 0, 0, 1, 1, 1]
        for timer in started:
            timers.cancel(timer)
        timers.start(told[0], ClientGone(), 0.1)
        await asyncio.sleep(1)
        assert len(told[0].at) == 1, "a step whose timers were all cancelled can be used again"

    run_sim(go)


def test_who_is_told_may_start_and_cancel_others() -> None:
    async def go() -> None:
        timers, first, second, third, late = RequestTimers(STEP_S), Told(), Told(), Told(), Told()
        others: list[RunningTimer] = []
        timers.start(late, ClientGone(), 2.0)

        def then() -> None:
            timers.cancel(others[0])
            timers.start(third, ClientGone(), 0.0)

        first.then = then
        timers.start(first, ClientGone(), 0.1)
        others.append(timers.start(second, ClientGone(), 0.1))
        await asyncio.sleep(0.2)
        assert (len(first.at), len(second.at), len(third.at), len(late.at)) == (1, 0, 1, 0)
        await asyncio.sleep(2)
        assert len(late.at) == 1

    run_sim(go)


def test_one_that_fails_keeps_nobody_from_being_told() -> None:
    async def go() -> None:
        timers, first, second, failures = RequestTimers(STEP_S), Told(), Told(), list[str]()
        asyncio.get_running_loop().set_exception_handler(lambda _, said: failures.append(str(said["exception"])))

        def fail() -> None:
            raise ValueError("a bug")

        first.then = fail
        for one in (first, second):
            timers.start(one, ClientGone(), 0.1)
        await asyncio.sleep(1)
        assert (len(first.at), len(second.at), failures) == (1, 1, ["a bug"])

    run_sim(go)


@pytest.mark.parametrize("count", [20_000])
async def test_many_that_are_cancelled_leave_little_behind(count: int) -> None:
    timers = RequestTimers(STEP_S)
    for _ in range(count):
        timers.cancel(timers.start(Told(), ClientGone(), 5.0))
    assert len(timers._steps) == len(timers._due) < 200
