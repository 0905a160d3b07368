"""Keeps an engine's process running: starts it, starts it again when it ends, gives up when it never could.

Owns the engine. The node's segment is not the engine's and outlives it, KV and all.
Invariant: while no engine is ready, whoever asks for it is told so at once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum

from engines.process.parent import EngineProcess
from kvcore.clock import Clock
from kvcore.errors import ConfigError, KVFerryError, NodeUnavailableError
from kvcore.telemetry import log_fields
from kvnode.limits import NodeLimits

_logger = logging.getLogger("kvnode")


class EngineState(StrEnum):
    """Where the node's engine is. Begins as `starting`:

    starting -> ready: its process has loaded the model and answers
    starting -> pausing: it did not become ready, and another start may help
    starting -> given_up: it did not become ready, no engine of this node ever has, and another start would not help
    ready -> pausing: its process ended, or is to be replaced
    pausing -> starting: the pause is over
    starting -> stopped: the node stops
    ready -> stopped: the node stops
    pausing -> stopped: the node stops
    """

    STARTING = "starting"
    READY = "ready"
    PAUSING = "pausing"
    GIVEN_UP = "given_up"
    STOPPED = "stopped"


_S = EngineState
TRANSITIONS: Mapping[EngineState, frozenset[EngineState]] = {
    _S.STARTING: frozenset({_S.READY, _S.PAUSING, _S.GIVEN_UP, _S.STOPPED}),
    _S.READY: frozenset({_S.PAUSING, _S.STOPPED}),
    _S.PAUSING: frozenset({_S.STARTING, _S.STOPPED}),
    _S.GIVEN_UP: frozenset(),
    _S.STOPPED: frozenset(),
}
"""The same as data: `EngineSupervisor` asserts on it."""


class EngineSupervisor:
    """Run it in a task. `make` gives an engine's process, not yet entered; `on_ready` is called with each once it is
    ready, and raises ConfigError for one that does not fit. After each process's end `on_end` is awaited, and each time
    that one hangs `on_hung`: both bound themselves and do not raise."""

    def __init__(
        self,
        make: Callable[[], EngineProcess],
        clock: Clock,
        *,
        start_attempts: int = 3,
        on_ready: Callable[[EngineProcess], None] = lambda _: None,
        on_end: Callable[[], Awaitable[None]] | None = None,
        on_hung: Callable[[], Awaitable[None]] | None = None,
        limits: NodeLimits = NodeLimits(),
    ) -> None:
        self._make = make
        self._clock = clock
        self._start_attempts = start_attempts
        self._on_ready = on_ready
        self._on_end = on_end
        self._on_hung = on_hung
        self._limits = limits
        self._engine: EngineProcess | None = None
        self._ready = asyncio.Event()
        self._state = EngineState.STARTING
        self._replacing = asyncio.Event()
        self._replacement: asyncio.Future[EngineProcess] | None = None
        """Of a replacement that is asked for, until it is ready or has failed."""
        self.restarts = 0

    def __repr__(self) -> str:
        pid = "" if self._engine is None else f" with pid {self._engine.pid}"
        return f"<EngineSupervisor {self._state}{pid}, {self.restarts} restarts>"

    @property
    def ready(self) -> bool:
        """Whether an engine serves now: one that is lost does not, from the moment on that its calls fail."""
        return self._engine is not None and not self._engine.ended

    def engine(self) -> EngineProcess:
        """The present engine. Raises NodeUnavailableError, at once, while there is none."""
        if self._engine is None or self._engine.ended:
            raise NodeUnavailableError("the node's engine is starting" + (" again" if self.restarts else ""))
        return self._engine

    async def wait_ready(self) -> None:
        """Until the first engine is ready. Whoever waits watches `run` too: it may give up."""
        await self._ready.wait()

    async def replace(self) -> EngineProcess:
        """End the present engine, cutting what it does, and start the one that `make` gives now; returns it when it is
        ready. Once asked for it comes to pass, though the caller be cancelled.

        Raises NodeUnavailableError while there is none to replace, and why the new one did not become ready: it is
        tried again all the same.
        """
        self.engine()
        if self._replacement is None:
            self._replacement = asyncio.get_running_loop().create_future()
            self._replacement.add_done_callback(_seen)
            self._replacing.set()
        return await asyncio.shield(self._replacement)

    async def run(self) -> None:
        """Until cancelled; then the engine is left. Raises the reason when it gives up before any engine was ready:
        a ConfigError at once, another failure at the last of `start_attempts`."""
        try:
            await self._keep_up()
        except asyncio.CancelledError:
            self._set_state(EngineState.STOPPED)
            self._tell_replacement(NodeUnavailableError("the node is stopping"))
            raise
        except KVFerryError:
            self._set_state(EngineState.GIVEN_UP)
            raise

    async def _keep_up(self) -> None:
        """One run of an engine after another. When one is over there are three cases:

        1. It was ready and its process ended, or was ended to be replaced: it is started again, in the latter case at
           once.
        2. It was not ready, and either an engine of this node has been before, or this is not the last attempt at a
           first one and the configuration is not at fault: it is tried again.
        3. It was not ready and nothing says that it ever will be: the reason is raised, and the node ends.

        What is tried again first gives back what the dead one held, then pauses; pauses double up to a bound, and start
        anew after an engine that lived long.
        """
        failures, limits = 0, self._limits
        backoff_s = limits.engine_first_backoff_s
        while True:
            started_at = self._clock.now()
            replaced = False
            try:
                reason = await self._run_engine_once()
                replaced = self._replacing.is_set()
                self.restarts += not replaced
            except KVFerryError as error:
                failures += 1
                self._tell_replacement(error)
                if not self._ready.is_set() and (isinstance(error, ConfigError) or failures >= self._start_attempts):
                    raise
                reason = error.message
            self._set_state(EngineState.PAUSING)
            if self._clock.now() - started_at >= limits.engine_healthy_s:
                backoff_s = limits.engine_first_backoff_s
            self._replacing.clear()
            if not replaced:
                down = {"reason": reason, "restarts": self.restarts, "retry_s": backoff_s}
                log_fields(_logger, logging.ERROR, "engine_down", **down)
            if self._on_end is not None:
                await self._on_end()
            if not replaced:
                await asyncio.sleep(backoff_s)
                backoff_s = min(limits.engine_longest_backoff_s, backoff_s * 2)
            self._set_state(EngineState.STARTING)

    async def _run_engine_once(self) -> str:
        """Returns why the process of an engine that was ready ended. Raises why it did not become ready."""
        async with self._make() as engine:
            self._engine = engine
            try:
                self._on_ready(engine)
                self._set_state(EngineState.READY)
                self._ready.set()
                self._tell_replacement(engine)
                return await self._end_of(engine)
            finally:
                self._engine = None

    async def _end_of(self, engine: EngineProcess) -> str:
        """Why it is over: its process has ended, or is to."""
        ended = asyncio.create_task(engine.wait_ended())
        asked = asyncio.create_task(self._replacing.wait())
        tended = asyncio.create_task(self._tend(engine))
        try:
            await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else "it is to be replaced"
        finally:
            for task in (ended, asked, tended):
                task.cancel()
            await asyncio.gather(tended, return_exceptions=True)  # it may be telling

    async def _tend(self, engine: EngineProcess) -> None:
        while True:
            await engine.wait_hung()
            log_fields(_logger, logging.WARNING, "engine_hangs", pid=engine.pid)
            if self._on_hung is not None:
                await self._on_hung()

    def _tell_replacement(self, outcome: EngineProcess | KVFerryError) -> None:
        """To whoever waits for a replacement."""
        waiting, self._replacement = self._replacement, None
        if waiting is None or waiting.done():
            return
        if isinstance(outcome, EngineProcess):
            waiting.set_result(outcome)
        else:
            waiting.set_exception(outcome)

    def _set_state(self, state: EngineState) -> None:
        assert state in TRANSITIONS[self._state], f"engine: {self._state} -> {state}"
        self._state = state


def _seen(future: "asyncio.Future[EngineProcess]") -> None:
    """Its caller may have gone: then nobody asks how it went."""
    if not future.cancelled():
        future.exception()
