"""Bring a whole cluster up on this machine and keep it up: one child process for each of its parts.

Owns the processes, their order and their restarts. One that ends before it was ever ready fails the launch, with its
last lines; one that has served is restarted with backoff, but for a node that was drained. Whatever happens to us, no
child outlives us.
"""

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.process.http_client import http_session, router_session
from kvcore.trust.certificates import ca_context, named
from kvcore.trust.opening import CLIENT, ClusterTrust, trust_source
from kvferry.launch.limits import LaunchLimits
from kvferry.launch.processes import STOP_ORDER, ProcessKind, ProcessPlan, plan_processes
from kvferry.launch.supervised import ProcessState, SupervisedProcess


@dataclass(frozen=True, slots=True)
class LauncherEvent:
    """One process changed its state. `after_s` since the launch began."""

    name: str
    state: ProcessState
    pid: int | None
    after_s: float
    detail: str = ""


class Launcher:
    """A cluster on this machine. Use it as an async context manager, or call `start` and `aclose`.

    `on_line(name, line)` gets every line of output, `on_event` every change of state; both on the loop, neither may
    block or raise. `plans` replaces the processes that the config stands for.
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
        plans: Sequence[ProcessPlan] | None = None,
        limits: LaunchLimits = LaunchLimits(),
    ) -> None:
        self._limits = limits
        stop_s = config.service.drain_s + limits.kill_margin_s
        self._stop_s = dict.fromkeys(ProcessKind, stop_s) | {ProcessKind.ROUTER: stop_s + config.router.drain_s}
        self._plans = list(plans) if plans is not None else plan_processes(config, config_file, overrides)
        self._configs = {plan.name: config for plan in self._plans}
        self._source = trust_source(config)
        self._log_dir = log_dir
        self._on_line = on_line
        self._on_event = on_event
        self._processes: dict[str, SupervisedProcess] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ordered: set[str] = set()
        """Those whose end was ordered, to be started again at once."""
        self._session: aiohttp.ClientSession | None = None
        self._inner: aiohttp.ClientSession | None = None
        self._stopping = False
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._began = 0.0
        self.events: deque[LauncherEvent] = deque(maxlen=1000)
        """The last changes of state, oldest first."""

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

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {state}" for name, state in self.states.items()) or "not started"
        return f"<Launcher {shown}>"

    @property
    def router_url(self) -> str:
        """The URL of the OpenAI API."""
        return next(plan.url for plan in self._plans if plan.kind is ProcessKind.ROUTER)

    @property
    def pids(self) -> dict[str, int]:
        """The pids of the processes that run now, by name: `metadata-server`, `router` and the nodes' names."""
        found = {name: process.pid for name, process in self._processes.items()}
        return {name: pid for name, pid in found.items() if pid is not None}

    @property
    def states(self) -> dict[str, ProcessState]:
        """The state of every process, by name."""
        return {name: process.state for name, process in self._processes.items()}

    @property
    def restarts(self) -> dict[str, int]:
        """How often each was started again."""
        return {name: process.restarts for name, process in self._processes.items()}

    def log_file(self, name: str) -> Path:
        """The file with the output of `name`; that of the launch before is beside it, with `.1` at the end."""
        return self._log_dir / f"{name}.log"

    async def start(self) -> None:
        """Start all processes, at the same time. Returns at once; see `wait_ready`.

        Raises ConfigError if the log folder cannot be written.
        """
        assert self._session is None, "started before"
        self._began = asyncio.get_running_loop().time()
        timeout = aiohttp.ClientTimeout(total=self._limits.health_timeout_s)
        self._session = router_session(trust=ClusterTrust(source=self._source), timeout=timeout)
        tls = self._source.tls
        known = True if tls is None else ca_context(named(tls, CLIENT))
        self._inner = http_session(connector=aiohttp.TCPConnector(ssl=known), timeout=timeout)
        for plan in self._plans:
            log_file = self.log_file(plan.name)
            process = SupervisedProcess(
                plan,
                log_file,
                self._session if plan.kind is ProcessKind.ROUTER and not (tls and plan.own_url) else self._inner,
                on_line=self._on_line,
                on_change=self._process_changed,
                limits=self._limits,
            )
            self._processes[plan.name] = process
        for process in self._processes.values():
            self._begin(process)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until every process serves. Raises ConfigError with the last lines of one that ended or is not ready."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_until(lambda: all(state is ProcessState.READY for state in self.states.values()))
        except TimeoutError:
            late = next(p for p in self._processes.values() if p.state is not ProcessState.READY)
            raise ConfigError(late.explain_late(timeout_s)) from None

    async def wait_restarted(self, name: str, old_pid: int, timeout_s: float) -> int:
        """Waits until `name` serves again under another pid than `old_pid`, which is returned. Raises TimeoutError."""
        process = self._processes[name]

        def is_back() -> bool:
            return process.state is ProcessState.READY and process.pid not in (None, old_pid)

        async with asyncio.timeout(timeout_s):
            await self._wait_until(is_back)
        return self.pids[name]

    def started_with(self, name: str) -> ClusterConfig:
        """The configuration by which `name` was last started. Raises KeyError."""
        return self._configs[name]

    def describe(self) -> list[SupervisedProcess]:
        """The processes, for who shows them."""
        return list(self._processes.values())

    async def restart(self, plan: ProcessPlan, config: ClusterConfig) -> None:
        """Stop the process of this name in order, and start it anew by this plan, which holds from then on. Returns
        when the one of before has ended. One that does not come up is tried again, as one that died. Raises KeyError.
        """
        process = self._processes[plan.name]
        process.plan, self._configs[plan.name] = plan, config
        self._plans = [plan if plan.name == one.name else one for one in self._plans]
        if self._stopping:
            return
        if process.state is ProcessState.STOPPED:
            self._begin(process)
            return
        self._ordered.add(plan.name)
        await process.end_child(self._stop_s[plan.kind])

    async def hang_up(self) -> None:
        """Have every process read its file again."""
        for pid in self.pids.values():
            os.kill(pid, signal.SIGHUP)

    async def watch(self) -> None:
        """Runs until the launcher fails, which it raises; for a TaskGroup that should go down with it."""
        await self._wait_until(lambda: False)

    async def aclose(self) -> None:
        """Stop all in order: router, nodes, metadata server; what does not end in time is killed. Idempotent.

        On cancellation everything is killed at once, and awaited.

        The order matters: a router whose nodes go first would answer with errors, and nodes tell the metadata server
        that they leave. Only then are the tasks cancelled that would start a process again; `_stopping` keeps them
        from it meanwhile. What is still alive after all of that, because we were cancelled, is killed by `close`.
        """
        self._stopping = True
        try:
            for kinds in STOP_ORDER:
                leaving = [process for process in self._processes.values() if process.plan.kind in kinds]
                await asyncio.gather(*(process.stop(self._stop_s[process.plan.kind]) for process in leaving))
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)  # told by `_task_done`
            await asyncio.gather(*(process.close() for process in self._processes.values()))
            for session in filter(None, (self._session, self._inner)):
                await session.close()

    def _begin(self, process: SupervisedProcess) -> None:
        task = self._tasks[process.name] = asyncio.create_task(self._keep_up(process), name=f"keep up {process.name}")
        task.add_done_callback(self._task_done)

    async def _keep_up(self, process: SupervisedProcess) -> None:
        """Run one process again and again. When a run of it has ended there are six cases:

        0. It was ended to be started anew: it is, at once.
        1. We are stopping: it was told to, and nothing follows.
        2. It never served, in this run or an earlier one: the configuration or the machine is at fault, starting it
           again would not help, and the launch fails with its last lines.
        3. A node ended in order, as somebody drained it: it stays down.
        4. It served for a while: it is started again after the shortest pause.
        5. It served before, but not now or not for long: each pause is twice the one before, up to a bound.
        """
        pause_s, now, limits = 0.0, asyncio.get_running_loop().time, self._limits
        while not self._stopping:
            started = now()
            self._ordered.discard(process.name)  # ordered in a pause: this is the start that was meant
            how = await process.run_once()
            if self._stopping:
                return
            if process.name in self._ordered:
                process.was_ready = True  # one that does not come up now fails no launch
                process.set_state(ProcessState.DIED, "ended by order; starting it again")
                process.restarts += 1
                continue
            if not process.was_ready:
                process.set_state(ProcessState.FAILED, how)
                raise ConfigError(process.explain(f"{how} before it was ready"))
            if process.plan.kind is ProcessKind.NODE and process.ended_in_order:
                process.set_state(ProcessState.STOPPED, "drained: it is not started again")
                return
            steady = process.state is ProcessState.READY and now() - started >= limits.steady_s
            first_s = limits.first_backoff_s
            pause_s = first_s if steady else min(2 * pause_s or first_s, limits.longest_backoff_s)
            process.set_state(ProcessState.DIED, f"{how}; starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            process.restarts += 1

    def _process_changed(self, process: SupervisedProcess, detail: str) -> None:
        after_s = asyncio.get_running_loop().time() - self._began
        event = LauncherEvent(process.name, process.state, process.pid, after_s, detail)
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)
        self._wake()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failure = self._failure or error
            self._wake()

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
