"""Each step has its own limit, one timer keeps them all, and what is between steps takes as long as it likes."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from support.sim_loop import run_sim

from kvcore.step_timeout import StepTimeout


def timed(steps: Callable[[StepTimeout], Awaitable[None]]) -> tuple[float, bool]:
    """(When the block ended, whether by TimeoutError.)"""

    async def main() -> tuple[float, bool]:
        began, late = asyncio.get_running_loop().time(), False
        try:
            async with StepTimeout() as limit:
                await steps(limit)
        except TimeoutError:
            late = True
        return asyncio.get_running_loop().time() - began, late

    return run_sim(main)


async def step(limit: StepTimeout, allowed: float, takes: float) -> None:
    limit.start(allowed)
    await asyncio.sleep(takes)
    limit.stop()


@pytest.mark.parametrize(
    ("steps", "ends", "late"),
    [
        ([(1.0, 0.9), (1.0, 0.9), (1.0, 0.9)], 2.7, False),
        ([(1.0, 5.0)], 1.0, True),
        ([(1.0, 0.9), (1.0, 5.0)], 1.9, True),
        ([(10.0, 0.5), (1.0, 5.0)], 1.5, True),  # the timer was set for a step that was allowed more
        ([(1.0, 0.1), (10.0, 9.0), (1.0, 5.0)], 10.1, True),
        ([(0.0, 1.0)], 0.0, True),
    ],
)
def test_the_step_that_takes_too_long_is_the_one_that_ends_it(
    steps: list[tuple[float, float]], ends: float, late: bool
) -> None:
    async def run(limit: StepTimeout) -> None:
        for allowed, takes in steps:
            await step(limit, allowed, takes)

    assert timed(run) == (pytest.approx(ends), late)


def test_nothing_is_limited_between_steps() -> None:
    async def run(limit: StepTimeout) -> None:
        await step(limit, 1.0, 0.5)
        await asyncio.sleep(100)
        assert repr(limit) == "<StepTimeout between steps>"
        await step(limit, 1.0, 0.5)

    assert timed(run) == (pytest.approx(101.0), False)


def test_a_cancellation_from_outside_stays_one() -> None:
    async def main() -> None:
        async def work() -> None:
            async with StepTimeout() as limit:
                limit.start(10.0)
                assert repr(limit) == "<StepTimeout 10.000 s left>"
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_sim(main)


def test_one_timer_serves_a_thousand_steps() -> None:
    async def main() -> int:
        loop, made = asyncio.get_running_loop(), 0
        call_at = loop.call_at

        def counted(*args: object, **more: object) -> asyncio.TimerHandle:
            nonlocal made
            made += 1
            return call_at(*args, **more)  # type: ignore[arg-type]

        async with StepTimeout() as limit:
            loop.call_at = counted  # type: ignore[method-assign, assignment]
            for _ in range(1000):
                limit.start(5.0)
                limit.stop()
        return made

    assert run_sim(main) == 1


def test_a_block_that_ends_already_is_not_ended_again() -> None:
    """The client of a late answer leaves while the answer's legs are being ended."""

    async def main() -> list[object]:
        loop, wrong = asyncio.get_running_loop(), list[object]()
        loop.set_exception_handler(lambda _, context: wrong.append(context))
        with pytest.raises(TimeoutError):
            async with StepTimeout() as limit:
                try:
                    limit.start(1.0)
                    await asyncio.Event().wait()
                finally:
                    limit.start(0.5)
                    await asyncio.sleep(2.0)
                    limit.expire()
        return wrong

    assert run_sim(main) == []
