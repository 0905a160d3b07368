"""SIGUSR1: a process writes into its log where each of its asyncio tasks stands, and what its parts say of themselves.

Owns that signal while it is entered. Invariant: no local variable is ever written, so neither prompts nor secrets are.
"""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType

from kvcore.telemetry import log_fields

Describe = Callable[[], Iterable[str]]
"""One line for each thing that a process wants in its dump. Must not block; names no prompt and no secret."""
_STEPS = ("async_generator_asend", "async_generator_athrow", "anext_awaitable")
_logger = logging.getLogger("kvcore.dump")


@contextmanager
def dump_on_signal(describe: Sequence[Describe] = ()) -> Iterator[None]:
    """Inside of it SIGUSR1 writes the dump. `describe` is read at each signal. Enter it in the main thread's loop."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, write_dump, describe)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


def write_dump(describe: Sequence[Describe]) -> None:
    """Log the tasks of the running loop and all lines of `describe`, whatever the log level is. Does not raise."""
    level = max(logging.WARNING, _logger.getEffectiveLevel())
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    log_fields(_logger, level, "dump_begin", tasks=len(tasks))
    for task in tasks:
        work = task.get_coro()
        log_fields(
            _logger, level, "dump_task", name=task.get_name(), runs=getattr(work, "__qualname__", None), at=_place(work)
        )
    for part in describe:
        try:
            lines = list(part())
        except Exception as error:  # the signal's boundary: a dump never ends a process
            lines = [f"could not be described: {type(error).__name__}"]
        for line in lines:
            log_fields(_logger, level, "dump_state", of=line)
    log_fields(_logger, level, "dump_end")


def _place(work: object) -> str | None:
    """`file:line function` of the innermost frame that is ours to see; None for what has no frame."""
    frame: FrameType | None = None
    while work is not None:
        found, work = _step_in(work)
        frame = found or frame
    return None if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


def _step_in(work: object) -> tuple[FrameType | None, object]:
    """The frame of something that can be awaited, and what that awaits in turn. Three cases:

    1. A coroutine, a generator or an asynchronous generator knows both.
    2. The object behind one step of an asynchronous generator does not show the generator; the garbage collector does.
    3. Anything else (a future, an event's waiter) is where the chain ends.
    """
    match work:
        case CoroutineType():
            return work.cr_frame, work.cr_await
        case GeneratorType():
            return work.gi_frame, work.gi_yieldfrom
        case AsyncGeneratorType():
            return work.ag_frame, work.ag_await
    if type(work).__name__ in _STEPS:
        inside = gc.get_referents(work)
        steps = (item for item in inside if isinstance(item, AsyncGeneratorType) or type(item).__name__ in _STEPS)
        return None, next(steps, None)
    return None, None
