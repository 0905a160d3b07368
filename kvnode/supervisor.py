"""Keeps an engine's process running: starts it, starts it again when it ends, gives up when it never could.

Owns the engine. The node's segment is not the engine's and outlives it, KV and all. Invariant: while no engine is
ready, whoever asks for it is told so at once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from engines.process.parent import EngineProcess
from kvcore.clock import Clock
from kvcore.errors import ConfigError, KVFerryError, NodeUnavailableError
from kvcore.telemetry import log_fields
from kvnode.limits import NodeLimits

_logger = logging.getLogger("kvnode")


class EngineSupervisor:
    """Run it in a task. `make` makes one life of the engine, not yet entered; `on_ready` is told of each that is.
    Between two lives `on_end` is awaited: it bounds itself and does not raise."""

    def __init__(
        self,
        make: Callable[[], EngineProcess],
        clock: Clock,
        *,
        start_attempts: int = 3,
        on_ready: Callable[[EngineProcess], None] = lambda _: None,
        on_end: Callable[[], Awaitable[None]] | None = None,
        limits: NodeLimits = NodeLimits(),
    ) -> None:
        self._make = make
        self._clock = clock
        self._start_attempts = start_attempts
        self._on_ready = on_ready
        self._on_end = on_end
        self._limits = limits
        self._engine: EngineProcess | None = None
        self._ready = asyncio.Event()
        self.restarts = 0

    def __repr__(self) -> str:
        state = "no engine is ready" if self._engine is None else f"engine of pid {self._engine.pid}"
        return f"<EngineSupervisor {state}, {self.restarts} restarts>"

    @property
    def ready(self) -> bool:
        """Whether an engine serves now."""
        return self._engine is not None

    def engine(self) -> EngineProcess:
        """The engine of now. Raises NodeUnavailableError, at once, while there is none."""
        if self._engine is None:
            raise NodeUnavailableError("the node's engine is starting" + (" again" if self.restarts else ""))
        return self._engine

    async def wait_ready(self) -> None:
        """Until the first engine is ready. Whoever waits watches `run` too: it may give up."""
        await self._ready.wait()

    async def run(self) -> None:
        """Until cancelled; then the engine is left. Raises the reason when it gives up before any engine was ready:
        a ConfigError at once, another failure at the last of `start_attempts`."""
        failures = 0
        backoff_s = self._limits.engine_first_backoff_s
        while True:
            started_at = self._clock.now()
            try:
                reason = await self._one_life()
                self.restarts += 1
            except KVFerryError as error:
                failures += 1
                if not self._ready.is_set() and (isinstance(error, ConfigError) or failures >= self._start_attempts):
                    raise
                reason = error.message
            if self._clock.now() - started_at >= self._limits.engine_healthy_s:
                backoff_s = self._limits.engine_first_backoff_s
            log_fields(_logger, logging.ERROR, "engine_down", reason=reason, restarts=self.restarts, retry_s=backoff_s)
            if self._on_end is not None:
                await self._on_end()
            await asyncio.sleep(backoff_s)
            backoff_s = min(self._limits.engine_longest_backoff_s, backoff_s * 2)

    async def _one_life(self) -> str:
        async with self._make() as engine:
            self._engine = engine
            try:
                self._on_ready(engine)
                self._ready.set()
                return await engine.wait_ended()
            finally:
                self._engine = None
