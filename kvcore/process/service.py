"""Run one process: logging, event loop, signals, one TaskGroup, one AsyncExitStack.

The soft limit of descriptors is raised to the hard one.
First SIGTERM or SIGINT: `Lifecycle.stopping` is set (before `ready` the start-up is cancelled). The second ends the
process at once. SIGHUP ends nothing, as terminals send it when they close, and no program that is started from here:
it is ignored, or does what `Lifecycle.on_hangup` was given.
SIGUSR1 writes a dump into the log (`kvcore.process.state_dump`). A background task that fails takes the process down.
The stack unwinds before the tasks are cancelled.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack

from kvcore.config.live.file import LiveFile
from kvcore.errors import ConfigError
from kvcore.process.child import kill_all_children
from kvcore.process.descriptors import raise_limit
from kvcore.process.state_dump import Describe, dump_on_signal
from kvcore.telemetry import configure_logging, log_fields, say_nothing_of_origins

EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_FORCED = 130

_logger = logging.getLogger("kvcore.service")


class Lifecycle:
    """What `main` gets: where to put what must be closed, what runs beside it, and when to stop."""

    def __init__(self, stack: AsyncExitStack, tasks: asyncio.TaskGroup) -> None:
        self.stack = stack
        """Unwound, last in first out, when `main` returns, fails or is cancelled."""
        self.tasks = tasks
        """Background work. An exception in one cancels all; what still runs once the stack has unwound is cancelled."""
        self.stopping = asyncio.Event()
        """Set by the first signal, or by whoever wants the process to end in order."""
        self.is_ready = False
        self.file: LiveFile | None = None
        """The cluster file that the process goes by, where it has one."""
        self.describe: list[Describe] = []
        """What SIGUSR1 writes into the log beside the tasks: add a function that gives one line a part."""

    def __repr__(self) -> str:
        state = "stopping" if self.stopping.is_set() else "ready" if self.is_ready else "starting"
        return f"<Lifecycle {state}>"

    def on_hangup(self, run: Callable[[], Coroutine[object, object, None]]) -> None:
        """Have `run` run at each SIGHUP from `ready` on, in place of nothing."""

        def begin() -> None:
            if self.is_ready:
                self.tasks.create_task(run(), name="hangup")

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, begin)

    def ready(self, **fields: object) -> None:
        """Log that the process serves. From here on a signal sets `stopping` and cancels nothing."""
        self.is_ready = True
        gc.freeze()  # what was imported and set up stays: no collection looks at it again
        log_fields(_logger, logging.INFO, "ready", pid=os.getpid(), **fields)


Main = Callable[[Lifecycle], Awaitable[None]]


class _Finished(Exception):  # noqa: N818 - not an error: ends the TaskGroup
    pass


def run_process(name: str, main: Main, *, log_level: str = "info") -> int:
    """Run `main` to its end; returns the exit code: 0, 1 (it or a task failed), 2 (ConfigError: one line on stderr).

    Call it on the main thread, once, from a program's entry point. `main` ends in order by awaiting
    `lifecycle.stopping`, draining, and returning.
    """
    configure_logging(name, log_level)
    say_nothing_of_origins()
    raise_limit()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # survives every exec
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_supervise(main))
    except BaseExceptionGroup as group:
        return _report(name, group)
    return 0


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes this machine's fastest event loop, for asyncio.Runner; None: asyncio's own."""
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: asyncio's own loop does the same, slower
        return None
    return uvloop.new_event_loop


async def _supervise(main: Main) -> None:
    stopped = False
    try:
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as outer:
            async with AsyncExitStack() as stack:
                lifecycle = Lifecycle(stack, tasks)
                outer.callback(_handle_signals(lifecycle))
                outer.enter_context(dump_on_signal(lifecycle.describe))
                try:
                    await main(lifecycle)
                except asyncio.CancelledError:
                    stopped = lifecycle.stopping.is_set() and not lifecycle.is_ready
                    raise
            raise _Finished  # cancels what still runs
    except* _Finished:
        pass
    except* asyncio.CancelledError:
        if not stopped:
            raise


def _handle_signals(lifecycle: Lifecycle) -> Callable[[], None]:
    """Handle SIGTERM and SIGINT; returns a function that ends this."""
    loop, main_task = asyncio.get_running_loop(), asyncio.current_task()
    assert main_task is not None
    seen = 0

    def on_signal(number: signal.Signals) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            log_fields(_logger, logging.WARNING, "forced_exit", signal=number.name)
            kill_all_children()
            os._exit(EXIT_FORCED)
        log_fields(_logger, logging.INFO, "stopping", signal=number.name)
        lifecycle.stopping.set()
        if not lifecycle.is_ready:
            main_task.cancel()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)

    def give_back() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    return give_back


def _report(name: str, group: BaseExceptionGroup[BaseException]) -> int:
    config_errors, failures = group.split(ConfigError)
    if failures is not None:
        _logger.critical("process_failed", exc_info=failures)
        return EXIT_FAILED
    for error in _leaf_errors(config_errors):
        sys.stderr.write(f"{name}: error: {error}\n")
    return EXIT_CONFIG


def _leaf_errors(error: BaseException | None) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaf_errors(inner)]
    return [] if error is None else [error]
