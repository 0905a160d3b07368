"""A network of simulated processes in virtual time: delays, losses, repeats, resets, one-way cuts, and death.

Owns every message under way. A process that is dead is heard no more: what it still does in this address space while it
is torn down reaches nobody. All chance comes from one seeded source.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvcore.errors import KVFerryError

T = TypeVar("T")
_WINDOW = 64
_HELD_S = 0.05


class NetworkError(Exception):
    """The other side was not reached, or the connection broke."""


class LateError(NetworkError):
    """No answer in time."""


class Trace:
    """What happened, line by line, and what was counted."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()

    def __call__(self, event: str, *facts: object) -> None:
        self.counts[event] += 1
        self.lines.append(f"{self._loop.time():.6f} {event} " + " ".join(map(str, facts)))


class SimProcess:
    """One life of one process on the host `name`. Its tasks die with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self._tasks: dict[asyncio.Task[object], None] = {}
        self._exchanges: dict[_Exchange, None] = {}

    def spawn(self, body: Coroutine[object, object, object]) -> "asyncio.Task[object]":
        """A task of this process."""
        task = asyncio.get_running_loop().create_task(body)
        self._tasks[task] = None
        task.add_done_callback(self._ended)
        return task

    def kill(self) -> None:
        """Dead at once: nothing it does from here on is heard; peers see their connections reset. Idempotent."""
        if not self.alive:
            return
        self.alive = False
        for exchange in list(self._exchanges):
            exchange.server_died()
        for task in list(self._tasks):
            task.cancel()

    async def gone(self) -> None:
        """Wait until the tasks of a killed process are torn down."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    def _ended(self, task: "asyncio.Task[object]") -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and self.alive and (bug := task.exception()):
            raise bug


@dataclass(slots=True)
class Rates:
    """How often what happens to one message. `slow_s`: the longest of the slow delays."""

    loss: float = 0.01
    slow: float = 0.04
    slow_s: float = 0.4
    reset: float = 0.01
    repeat: float = 0.05
    frame_reset: float = 0.002

    def times(self, factor: float) -> "Rates":
        """All of it that much more often."""
        rates = (self.loss, self.slow, self.reset, self.repeat, self.frame_reset)
        loss, slow, reset, repeat, frame_reset = (min(0.5, rate * factor) for rate in rates)
        return Rates(loss, slow, self.slow_s, reset, repeat, frame_reset)


class SimNetwork:
    """Joins the processes in `hosts` (name -> the life of now). Cuts are one-way."""

    def __init__(self, seed: int, trace: Trace, rates: Rates) -> None:
        self.hosts: dict[str, SimProcess] = {}
        self.trace = trace
        self.rates = rates
        self.dice = random.Random(seed)
        self._cuts: set[tuple[str, str]] = set()
        self.loop = asyncio.get_running_loop()

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from `source` to `target` any more."""
        self._cuts.add((source, target))

    def heal(self, source: str, target: str) -> None:
        """Undo a cut."""
        self._cuts.discard((source, target))

    def calm(self) -> None:
        """From now on nothing fails."""
        self._cuts.clear()
        self.rates = Rates(loss=0, slow=0, reset=0, repeat=0, frame_reset=0)

    def is_cut(self, source: str, target: str) -> bool:
        """Whether messages from `source` to `target` are lost."""
        return (source, target) in self._cuts

    def delay_s(self) -> float:
        """Of one message."""
        if self.dice.random() < self.rates.slow:
            return self.dice.uniform(0.002, self.rates.slow_s)
        return self.dice.uniform(0.0002, 0.002)

    def lost(self, source: str, target: str) -> bool:
        """Whether one message gets lost."""
        return self.is_cut(source, target) or self.dice.random() < self.rates.loss

    async def call(
        self,
        source: SimProcess,
        target: str,
        serve: Callable[[SimProcess], Awaitable[T]],
        *,
        timeout_s: float,
        repeatable: bool,
    ) -> T:
        """Run `serve` in the target's process and bring its result or its KVFerryError back. Raises NetworkError."""
        if not source.alive:
            raise NetworkError(f"{source.name} is dead")
        exchange = _Exchange(self, source, target, serve)
        exchange.send()
        if repeatable and self.dice.random() < self.rates.repeat:
            self.trace("repeated", source.name, target)
            _Exchange(self, source, target, serve).send(extra_s=self.delay_s())
        if self.dice.random() < self.rates.reset:
            self.loop.call_later(self.delay_s(), exchange.reset)
        try:
            async with asyncio.timeout(timeout_s):
                return await exchange.done  # type: ignore[return-value]
        except TimeoutError as error:
            self.trace("late", source.name, target)
            raise LateError(f"{target} did not answer {source.name}") from error
        finally:
            exchange.client_gone()

    async def stream(
        self, source: SimProcess, target: str, serve: Callable[[SimProcess], AsyncGenerator[T, None]], silence_s: float
    ) -> AsyncGenerator[T, None]:
        """What `serve` yields in the target's process, in order. Raises NetworkError when it breaks, LateError after
        `silence_s` without an item. Closing it closes `serve`."""
        pipe: _Pipe[T] = _Pipe(self, source, target)

        async def pump(process: SimProcess) -> None:
            try:
                async with aclosing(serve(process)) as items:
                    async for item in items:
                        await pipe.push(item)
            except KVFerryError as error:
                await pipe.push(error)
            await pipe.push(None)

        exchange = _Exchange(self, source, target, pump, pipe.fail)
        exchange.send()
        pipe.broken = exchange.reset
        try:
            while True:
                try:
                    async with asyncio.timeout(silence_s):
                        item = await pipe.pull()
                except TimeoutError as error:
                    self.trace("silent", source.name, target)
                    raise LateError(f"{target} is silent") from error
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            exchange.client_gone()


class _Exchange:
    """One request and its answer. `failed` is told of a broken connection; else it is the answer."""

    def __init__(
        self,
        network: SimNetwork,
        source: SimProcess,
        target: str,
        serve: Callable[[SimProcess], Awaitable[object]],
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self._network = network
        self._source = source
        self._target = target
        self._serve = serve
        self._server: SimProcess | None = None
        self._task: asyncio.Task[object] | None = None
        self._over = False
        self.done: asyncio.Future[object] = network.loop.create_future()
        self._failed = failed or self._fail

    def send(self, extra_s: float = 0.0) -> None:
        """The request goes off."""
        network = self._network
        if network.lost(self._source.name, self._target):
            network.trace("lost", self._source.name, self._target)
            return
        network.loop.call_later(network.delay_s() + extra_s, self._arrive)

    def reset(self) -> None:
        """The connection breaks, both sides see it."""
        if not self._over:
            self._network.trace("reset", self._source.name, self._target)
            self._over = True
            self._failed(NetworkError(f"connection of {self._source.name} to {self._target} was reset"))
            self._stop_server()

    def server_died(self) -> None:
        """Its host sends a reset, if that gets through."""
        if not self._network.is_cut(self._target, self._source.name):
            self._network.loop.call_later(self._network.delay_s(), self._hear_death)

    def client_gone(self) -> None:
        """The server learns it, unless the way is cut: then it works on for nothing."""
        if not self._over:
            self._over = True
            if not self._network.is_cut(self._source.name, self._target):
                self._network.loop.call_later(self._network.delay_s(), self._stop_server)

    def _arrive(self) -> None:
        if self._over:  # the connection was closed before the request came through
            return
        server = self._network.hosts.get(self._target)
        if server is None or not server.alive:
            self.server_died()
            return
        self._server = server
        server._exchanges[self] = None
        self._task = server.spawn(self._run(server))

    async def _run(self, server: SimProcess) -> None:
        try:
            try:
                result: object = await self._serve(server)
            except KVFerryError as error:
                result = error
            network = self._network
            if server.alive and not network.lost(self._target, self._source.name):
                network.loop.call_later(network.delay_s(), self._answer, result)
        finally:
            server._exchanges.pop(self, None)

    def _answer(self, result: object) -> None:
        if isinstance(result, Exception):
            self._fail(result)
        elif not self.done.done():
            self.done.set_result(result)

    def _hear_death(self) -> None:
        if not self._over:
            self._failed(NetworkError(f"{self._target} is not there"))

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # nobody may be waiting any more

    def _stop_server(self) -> None:
        if self._task is not None:
            self._task.cancel()


class _Pipe(Generic[T]):
    """Items on their way to a reader, in order; None is the end."""

    def __init__(self, network: SimNetwork, source: SimProcess, target: str) -> None:
        self._network = network
        self._way = (target, source.name)
        self._items: deque[tuple[float, T | Exception | None]] = deque()
        self._last = 0.0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self.broken: Callable[[], None] = lambda: None

    async def push(self, item: T | Exception | None) -> None:
        """Waits while the way is cut (the sender's transport tries again) and while the window is full."""
        network = self._network
        if network.dice.random() < network.rates.frame_reset:
            self.broken()
            await asyncio.sleep(_HELD_S)
        while network.is_cut(*self._way):  # noqa: ASYNC110 - polling costs virtual time only
            await asyncio.sleep(_HELD_S)
        while len(self._items) >= _WINDOW:
            self._room.clear()
            await self._room.wait()
        self._add(item)

    def fail(self, error: Exception) -> None:
        """The connection broke: what is on its way is lost."""
        self._items.clear()
        self._last = 0.0
        self._add(error)

    async def pull(self) -> T | Exception | None:
        """The next item, once it has arrived."""
        while True:
            while not self._items:
                self._news.clear()
                await self._news.wait()
            wait_s = self._items[0][0] - self._network.loop.time()
            if wait_s <= 0:
                self._room.set()
                return self._items.popleft()[1]
            await asyncio.sleep(wait_s)

    def _add(self, item: T | Exception | None) -> None:
        self._last = max(self._last, self._network.loop.time() + self._network.delay_s())
        self._items.append((self._last, item))
        self._news.set()
