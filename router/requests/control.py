"""Tasks that outlive the request that began them, each with a bound of its own."""

import asyncio
import logging
from collections.abc import Coroutine, Iterable

from kvcore.errors import KVFerryError
from kvcore.telemetry import log_fields

_log = logging.getLogger("router")


class ControlCalls:
    """Aborts and ends of handoffs under way, and the last bytes of legs whose request has ended. One a router."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def send(self, call: Coroutine[object, object, None]) -> None:
        """Run a control call beside the requests; it has its own deadline and may fail."""
        self.adopt([asyncio.create_task(_log_failure(call))])

    def adopt(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        """Keep tasks that end by themselves within a bound."""
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def aclose(self, timeout_s: float) -> None:
        """Wait this long for what is under way, then cancel it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in list(self._tasks):
            task.cancel()


async def _log_failure(call: Coroutine[object, object, None]) -> None:
    try:
        await call
    except KVFerryError as error:
        log_fields(_log, logging.DEBUG, "control_call_failed", code=error.code, error=error.message)
