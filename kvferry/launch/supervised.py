"""One process of a cluster on this machine: its present child, its log and last lines, its health.

Decides nothing about restarts; `kvferry.launch.launcher` does.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TextIO

import aiohttp

from kvcore.errors import ConfigError
from kvcore.ports import why_unreachable
from kvcore.process.child import ChildProcess
from kvferry.launch.limits import LaunchLimits
from kvferry.launch.processes import ProcessPlan

_LAST_LINES = 30


class ProcessState(StrEnum):
    """Where one process of the cluster is. Made as `starting`; the order of a life:

    starting -> starting: its first child has been started
    starting -> ready: its health was asked for and is good
    starting -> failed: it ended and had never been ready, so the launch fails
    starting -> died: it ended; it had been ready in an earlier child
    ready -> died: it ended by itself
    died -> starting: the pause is over, a new child has been started
    starting -> stopped: it was told to stop, by us or as a node that is drained
    ready -> stopped: it was told to stop, likewise
    died -> stopped: it was told to stop in the pause
    failed -> stopped: the others are told to stop, and so is what is left of it
    stopped -> starting: it is a node that was drained, and is to be started anew
    """

    STARTING = "starting"
    READY = "ready"
    DIED = "died"
    FAILED = "failed"
    STOPPED = "stopped"


_S = ProcessState
TRANSITIONS: Mapping[ProcessState, frozenset[ProcessState]] = {
    _S.STARTING: frozenset({_S.STARTING, _S.READY, _S.FAILED, _S.DIED, _S.STOPPED}),
    _S.READY: frozenset({_S.DIED, _S.STOPPED}),
    _S.DIED: frozenset({_S.STARTING, _S.STOPPED}),
    _S.FAILED: frozenset({_S.STOPPED}),
    _S.STOPPED: frozenset({_S.STARTING}),
}
"""The same as data: `SupervisedProcess.set_state` asserts on it."""


class SupervisedProcess:
    """Opens its log file when made (ConfigError if that fails) and keeps it until `close`.

    `on_line(name, line)` and `on_change(process, detail)` are called on the loop.
    """

    def __init__(
        self,
        plan: ProcessPlan,
        log_file: Path,
        session: aiohttp.ClientSession,
        *,
        on_line: Callable[[str, str], None] | None,
        on_change: Callable[["SupervisedProcess", str], None],
        limits: LaunchLimits,
    ) -> None:
        self.plan = plan
        self.log_file = log_file
        self.state = ProcessState.STARTING
        self.was_ready = False
        self.restarts = 0
        self.detail = ""
        """What was last said of its state."""
        self._log = _open_log(log_file)
        self._session = session
        self._on_line = on_line
        self._on_change = on_change
        self._limits = limits
        self._hung = ""
        self._child: ChildProcess | None = None
        self._problem = "not asked yet"
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)

    def __repr__(self) -> str:
        return f"<SupervisedProcess {self.name}, {self.state}, pid {self.pid}, {self.restarts} restarts>"

    @property
    def name(self) -> str:
        """As in logs and in the config."""
        return self.plan.name

    @property
    def pid(self) -> int | None:
        """The pid of the child; None while none runs."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    @property
    def ended_in_order(self) -> bool:
        """Whether its last child has ended as one that was told to stop does."""
        return self._child is not None and self._child.returncode == 0

    async def run_once(self) -> str:
        """Start it and wait for it to end; returns how it ended. Its state is READY then iff it had served."""
        self._child, self._hung = await ChildProcess.start(self.plan.command, on_line=self._take_line), ""
        self.set_state(ProcessState.STARTING)
        polling = asyncio.create_task(self._look_after(self._child))
        try:
            returncode = await self._child.wait()
        finally:
            polling.cancel()
            with suppress(asyncio.CancelledError):
                await polling
        if self._hung:
            return self._hung
        return f"was ended by signal {-returncode}" if returncode < 0 else f"ended with exit code {returncode}"

    def set_state(self, state: ProcessState, detail: str = "") -> None:
        """Change the state and tell. The step is one of TRANSITIONS."""
        assert state in TRANSITIONS[self.state], f"{self.name}: {self.state} -> {state}"
        self.state, self.detail = state, detail
        self._on_change(self, detail)

    async def end_child(self, deadline_s: float) -> None:
        """SIGTERM to what runs of it, at the deadline SIGKILL. Says nothing of its state."""
        if self._child is not None:
            await self._child.terminate(deadline_s)

    async def stop(self, deadline_s: float) -> None:
        """SIGTERM, at the deadline SIGKILL; afterwards it is STOPPED."""
        await self.end_child(deadline_s)
        if self.state is not ProcessState.STOPPED:
            self.set_state(ProcessState.STOPPED)

    async def close(self) -> None:
        """Kill it if it runs, wait for that, close the log. Idempotent."""
        if self._child is not None:
            self._child.kill()
            await self._child.wait()
        with suppress(OSError):  # what a full disk did not take
            self._log.close()

    @property
    def last_lines(self) -> list[str]:
        """Of its output, the oldest first."""
        return list(self._last_lines)

    def explain(self, what: str) -> str:
        """`what` went wrong with it, and its last lines."""
        lines = "\n".join(f"  | {line}" for line in self._last_lines) or "  | (it said nothing)"
        return f"{self.name} {what}; its last lines (all: {self.log_file}):\n{lines}"

    def explain_late(self, timeout_s: float) -> str:
        """That it was not ready in time, and why."""
        return self.explain(f"was not ready after {timeout_s:g} s ({self._problem})")

    async def _look_after(self, child: ChildProcess) -> None:
        await self._poll_health()
        if self.plan.own_url is not None:
            await self._watch(child)

    async def _watch(self, child: ChildProcess) -> None:
        """Kills it if it hangs: the kernel goes on to deal connections out to it that the others would serve. Whatever
        it answers, and that it takes no connection any more, is none of that."""
        silent, limits = 0, self._limits
        while silent < limits.most_silent:
            await asyncio.sleep(limits.watch_s)
            try:
                await self._ask()
            except TimeoutError:
                silent += 1
                continue
            except (aiohttp.ClientError, OSError):
                pass
            silent = 0
        self._hung = f"hung: {silent} questions had no answer within {limits.health_timeout_s:g} s each; it was killed"
        child.kill()

    async def _poll_health(self) -> None:
        while self._problem:
            self._problem = await self._ask_health()
            if self._problem:
                await asyncio.sleep(self._limits.poll_s)
        self._problem = "it has ended since"
        self.was_ready = True
        if self.state is ProcessState.STARTING:  # not stopped while the answer was on its way
            self.set_state(ProcessState.READY)

    async def _ask_health(self) -> str:
        """Why it is not healthy; empty where it is."""
        try:
            return await self._ask()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return why_unreachable(error)

    async def _ask(self) -> str:
        """As `_ask_health`. Raises what aiohttp does, TimeoutError where it says nothing."""
        async with self._session.get(self.plan.health_url) as reply:
            body = await reply.content.read(300)
            return "" if reply.status == 200 else f"HTTP {reply.status} {body.decode('utf-8', 'replace')}"

    def _take_line(self, line: str) -> None:
        self._last_lines.append(line)
        with suppress(OSError):  # a full disk: better no log than no cluster
            self._log.write(line + "\n")
        if self._on_line is not None:
            self._on_line(self.name, line)


def _open_log(file: Path) -> TextIO:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            file.replace(file.with_name(f"{file.name}.1"))
        return file.open("w", encoding="utf-8", errors="replace", buffering=1)
    except OSError as error:
        raise ConfigError(f"cannot write the log {file}: {error.strerror}; give another folder by --log-dir") from error
