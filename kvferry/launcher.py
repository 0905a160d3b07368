"""Bring a whole cluster up on this machine and keep it up: one child process for each of its parts.

Owns the children, their log files and their restarts. A child that dies before it was ever ready fails the launch,
with its last lines; one that has served is restarted with backoff. Whatever happens to us, no child outlives us.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

import aiohttp

from kvcore.child import ChildProcess
from kvcore.config import ClusterConfig
from kvcore.errors import ConfigError
from kvferry.processes import STOP_ORDER, Part, ProcessPlan, plan_processes

_POLL_S = 0.1
_POLL_TIMEOUT_S = 2.0
_BACKOFF_S = (0.2, 5.0)
_LAST_LINES = 30
_KILL_MARGIN_S = 5.0


class ProcessState(StrEnum):
    """Where one process of the cluster is."""

    STARTING = "starting"
    READY = "ready"
    DIED = "died"
    """Ended by itself; it is started again after a pause."""
    FAILED = "failed"
    """Never became ready: the launch fails."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class LauncherEvent:
    """One process changed its state. `after_s` since the launch began."""

    name: str
    state: ProcessState
    pid: int | None
    after_s: float
    detail: str = ""


class _Process:
    """One part of the cluster: its present child and what it said last."""

    def __init__(self, plan: ProcessPlan, log: TextIO) -> None:
        self.plan = plan
        self.log = log
        self.state = ProcessState.STARTING
        self.child: ChildProcess | None = None
        self.was_ready = False
        self.restarts = 0
        self.problem = "not answering yet"
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)


class Launcher:
    """A cluster on this machine. Use it as an async context manager, or call `start` and `aclose`.

    `on_line(name, line)` gets every line of output, `on_event` every change of state; both on the loop, neither may
    block or raise.
    """

    def __init__(
        self,
        config: ClusterConfig,
        config_file: Path,
        *,
        log_dir: Path,
        overrides: Sequence[str] = (),
        on_line: Callable[[str, str], None] | None = None,
        on_event: Callable[[LauncherEvent], None] | None = None,
    ) -> None:
        self._config = config
        self._plans = plan_processes(config, config_file, overrides)
        self._log_dir = log_dir
        self._on_line = on_line
        self._on_event = on_event
        self._processes: dict[str, _Process] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        self._stopping = False
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._began = 0.0
        self.events: deque[LauncherEvent] = deque(maxlen=1000)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def router_url(self) -> str:
        """Where clients go."""
        return next(plan.url for plan in self._plans if plan.part is Part.ROUTER)

    @property
    def pids(self) -> dict[str, int]:
        """Of the children that run now, by name: `metadata-server`, `router` and the nodes' names."""
        running = {name: process.child for name, process in self._processes.items()}
        return {name: child.pid for name, child in running.items() if child is not None and child.returncode is None}

    @property
    def states(self) -> dict[str, ProcessState]:
        """Of every process, by name."""
        return {name: process.state for name, process in self._processes.items()}

    @property
    def restarts(self) -> dict[str, int]:
        """How often each was started again."""
        return {name: process.restarts for name, process in self._processes.items()}

    def log_file(self, name: str) -> Path:
        """Where the output of `name` goes; the run before is beside it, with `.1` at the end."""
        return self._log_dir / f"{name}.log"

    async def start(self) -> None:
        """Start all processes, at the same time. Returns at once; see `wait_ready`.

        Raises ConfigError if the log folder cannot be written.
        """
        assert not self._tasks, "started before"
        self._began = asyncio.get_running_loop().time()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_POLL_TIMEOUT_S))
        for plan in self._plans:
            self._processes[plan.name] = _Process(plan, self._open_log(plan.name))
        self._tasks = [
            asyncio.create_task(self._keep_up(process), name=f"keep up {name}")
            for name, process in self._processes.items()
        ]
        for task in self._tasks:
            task.add_done_callback(self._task_done)

    async def wait_ready(self, timeout_s: float) -> None:
        """Until every process serves. Raises ConfigError with the last lines of the one that ended or is not ready."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_until(lambda: all(p.state is ProcessState.READY for p in self._processes.values()))
        except TimeoutError:
            late = next(p for p in self._processes.values() if p.state is not ProcessState.READY)
            problem = f"{late.plan.name} was not ready after {timeout_s:g} s ({late.problem})"
            raise ConfigError(self._with_last_lines(late, problem)) from None

    async def wait_restarted(self, name: str, old_pid: int, timeout_s: float) -> int:
        """Until `name` serves again under another pid than `old_pid`, which is returned. Raises TimeoutError."""
        process = self._processes[name]

        def is_back() -> bool:
            return process.state is ProcessState.READY and process.child is not None and process.child.pid != old_pid

        async with asyncio.timeout(timeout_s):
            await self._wait_until(is_back)
        return self.pids[name]

    async def watch(self) -> None:
        """Runs until the launcher fails, which it raises; for a TaskGroup that should go down with it."""
        await self._wait_until(lambda: False)

    async def aclose(self) -> None:
        """Stop all in order: router, nodes, metadata server; what does not end in time is killed. Idempotent.

        On cancellation everything is killed at once, and awaited.
        """
        self._stopping = True
        try:
            for part_names in STOP_ORDER:
                leaving = [p for p in self._processes.values() if p.plan.part in part_names]
                await asyncio.gather(*(self._stop(process) for process in leaving))
        finally:
            await self._kill_all()

    async def _kill_all(self) -> None:
        for process in self._processes.values():
            if process.child is not None:
                process.child.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # told by `_task_done`
        for process in self._processes.values():
            if process.child is not None:
                await process.child.wait()
            process.log.close()
        if self._session is not None:
            await self._session.close()

    async def _stop(self, process: _Process) -> None:
        child = process.child
        if child is not None and child.returncode is None:
            await child.terminate(self._config.service.drain_s + _KILL_MARGIN_S)
        if process.state is not ProcessState.STOPPED:
            self._set_state(process, ProcessState.STOPPED)

    # --- one process ---

    async def _keep_up(self, process: _Process) -> None:
        try:
            await self._run_and_restart(process)
        except (OSError, ValueError) as error:  # cannot fork, no descriptors left
            self._fail(ConfigError(f"cannot start {process.plan.name}: {error}"))

    async def _run_and_restart(self, process: _Process) -> None:
        pause_s = _BACKOFF_S[0]
        while not self._stopping:
            served = await self._run_once(process)
            if self._stopping:
                return
            assert process.child is not None
            how = _ending(process.child.returncode)
            if not process.was_ready:
                self._set_state(process, ProcessState.FAILED, how)
                self._fail(
                    ConfigError(self._with_last_lines(process, f"{process.plan.name} {how} before it was ready"))
                )
                return
            pause_s = _BACKOFF_S[0] if served else min(2 * pause_s, _BACKOFF_S[1])
            self._set_state(process, ProcessState.DIED, f"{how}; starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            process.restarts += 1

    async def _run_once(self, process: _Process) -> bool:
        """Start it, wait for it to end; returns whether it served in between."""
        process.child = child = await ChildProcess.start(
            process.plan.command, on_line=lambda line: self._take_line(process, line)
        )
        self._set_state(process, ProcessState.STARTING)
        polling = asyncio.create_task(self._poll_health(process))
        try:
            await child.wait()
        finally:
            polling.cancel()
            with suppress(asyncio.CancelledError):
                await polling
        return process.state is ProcessState.READY

    async def _poll_health(self, process: _Process) -> None:
        while True:
            process.problem = await self._health_problem(process.plan.health_url)
            if not process.problem:
                break
            await asyncio.sleep(_POLL_S)
        process.was_ready = True
        self._set_state(process, ProcessState.READY)

    async def _health_problem(self, url: str) -> str:
        """Empty: healthy."""
        assert self._session is not None
        try:
            async with self._session.get(url) as reply:
                body = await reply.content.read(300)
                return "" if reply.status == 200 else f"HTTP {reply.status} {body.decode('utf-8', 'replace')}"
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return str(error) or type(error).__name__

    # --- what happened ---

    def _take_line(self, process: _Process, line: str) -> None:
        process.last_lines.append(line)
        process.log.write(line + "\n")
        if self._on_line is not None:
            self._on_line(process.plan.name, line)

    def _set_state(self, process: _Process, state: ProcessState, detail: str = "") -> None:
        process.state = state
        pid = process.child.pid if process.child is not None else None
        event = LauncherEvent(process.plan.name, state, pid, asyncio.get_running_loop().time() - self._began, detail)
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)
        self._wake()

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._wake()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._fail(error)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_until(self, is_true: Callable[[], bool]) -> None:
        while True:
            if self._failure is not None:
                raise self._failure
            if is_true():
                return
            await self._changed.wait()

    def _with_last_lines(self, process: _Process, problem: str) -> str:
        lines = "\n".join(f"  | {line}" for line in process.last_lines) or "  | (it said nothing)"
        return f"{problem}; its last lines (all: {self.log_file(process.plan.name)}):\n{lines}"

    def _open_log(self, name: str) -> TextIO:
        file = self.log_file(name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                file.replace(file.with_name(f"{name}.log.1"))
            return file.open("w", encoding="utf-8", errors="replace", buffering=1)
        except OSError as error:
            raise ConfigError(
                f"cannot write the log {file}: {error.strerror}; give another folder by --log-dir"
            ) from error


def _ending(returncode: int | None) -> str:
    assert returncode is not None
    return f"was ended by signal {-returncode}" if returncode < 0 else f"ended with exit code {returncode}"
