"""An event loop whose time is virtual: it jumps to the next timer when nothing is ready.

With a seed, callbacks that are ready at the same time run in a shuffled order, the same for the same seed. No threads,
and no sockets that somebody waits for.
"""

import asyncio
import heapq
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SimDeadlockError(AssertionError):
    """Nothing is ready, no timer is set: the simulation would hang for ever."""


class SimTimeLimitError(AssertionError):
    """Virtual time has passed the limit: something livelocks or waits too long."""


class LoopClock:
    """A `kvcore.clock.Clock` on the running loop's time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return 1_700_000_000.0 + self._loop.time()


class _JumpingSelector(selectors.SelectSelector):
    """Never blocks: instead of waiting for `timeout`, moves the loop's time on."""

    loop: "SimLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise SimDeadlockError(f"at {self.loop.time():.6f} s nothing is ready and no timer is set")
        if timeout > 0:
            self.loop.jump()
        return []


class SimLoop(asyncio.SelectorEventLoop):
    """Time starts at 0 and moves only in jumps. `seed` None: first in, first out, as asyncio does."""

    def __init__(self, seed: int | None = None, limit_s: float = float("inf")) -> None:
        self._virtual_now = 0.0
        self._limit_s = limit_s
        self._random = None if seed is None else random.Random(seed)
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self._virtual_now

    def jump(self) -> None:
        """To the next timer."""
        scheduled: list[Any] = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
        if scheduled:
            self._virtual_now = max(self._virtual_now, scheduled[0]._when)
        if self._virtual_now > self._limit_s:
            raise SimTimeLimitError(f"virtual time passed {self._limit_s} s")

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined]
        if self._random is not None and len(ready) > 1:
            handles = list(ready)
            self._random.shuffle(handles)
            ready.clear()
            ready.extend(handles)
        super()._run_once()  # type: ignore[misc]


class SimSeedLoop(SimLoop):
    """Also the same between processes: tasks that became ready in one turn are ordered by their birth, then shuffled.

    Without that, sets of tasks and of events would bring the order of their addresses in. `after_turn` is called after
    each turn of the loop with its number.
    """

    def __init__(self, seed: int, limit_s: float) -> None:
        super().__init__(seed, limit_s)
        self._births = 0
        self.turns = 0
        self.after_turn: Callable[[int], None] = lambda _: None

    def create_task(self, coro, *, name=None, context=None):  # type: ignore[no-untyped-def]
        self._births += 1
        return super().create_task(coro, name=f"{self._births:09d} {name or ''}", context=context)

    def _run_once(self) -> None:
        ready = self._ready  # type: ignore[attr-defined]
        if len(ready) > 1:
            handles = list(ready)
            at, steps = [], []
            for place, handle in enumerate(handles):
                owner = getattr(handle._callback, "__self__", None)
                if isinstance(owner, asyncio.Task):
                    at.append(place)
                    steps.append((owner.get_name(), place, handle))
            for place, (_, _, handle) in zip(at, sorted(steps, key=lambda step: step[:2]), strict=True):
                handles[place] = handle
            ready.clear()
            ready.extend(handles)
        super()._run_once()
        self.turns += 1
        self.after_turn(self.turns)


def run_sim(
    main: Callable[[], Coroutine[Any, Any, T]],
    *,
    seed: int | None = None,
    limit_s: float = float("inf"),
    loop: SimLoop | None = None,
) -> T:
    """Run `main()` under virtual time; afterwards no task may be left. Fails on a deadlock and past `limit_s`.

    `loop`: one made by the caller, instead of one of `seed` and `limit_s`; it is closed at the end."""
    loop = loop or SimLoop(seed, limit_s)
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    try:
        task = loop.create_task(main())
        try:
            result = loop.run_until_complete(task)
        except BaseException:
            for other in asyncio.all_tasks(loop):
                other.cancel()
            raise
        left = [other for other in asyncio.all_tasks(loop) if not other.done()]
        assert not left, f"tasks left over: {left}"
        loop.run_until_complete(loop.shutdown_asyncgens())
        assert not errors, f"unhandled: {errors}"
        return result
    finally:
        loop.close()
