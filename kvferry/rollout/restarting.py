"""Who starts a process anew: the launcher on this machine, a command that was given, or a person.

All three are asked the same way. Whether the process came up is the cluster's to say, not theirs.
"""

import asyncio
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.process.child import ChildProcess
from kvcore.process.service import EXIT_CONFIG
from kvferry.launch.control import LaunchedProcess, LauncherAwayError, LookOrder, RestartOrder, ask_launcher
from kvferry.launch.processes import ProcessPlan
from kvferry.rollout.limits import RolloutLimits

Say = Callable[[str], None]


class RestartFailedError(Exception):
    """The process could not be started anew. Its text is a sentence for people."""


class HopelessError(RestartFailedError):
    """The process cannot run by this file, on this machine: it says so itself."""


class Restarter(Protocol):
    """Has processes started anew by the file that is rolled out."""

    async def restart(self, name: str) -> None:
        """Returns when the one of before has ended, or will soon. Raises RestartFailedError."""
        ...

    @property
    def waits(self) -> bool:
        """Whether a process has ended, or is about to, when `restart` returns; else somebody may still have to act."""
        ...

    async def is_up(self, name: str) -> bool | None:
        """Whether the new one serves. None: only the cluster can say. Raises HopelessError."""
        ...

    async def why_not(self, name: str) -> str:
        """What is known of one that does not come up; empty: nothing."""
        ...


@dataclass(frozen=True, slots=True)
class FileGiven:
    """What is rolled out. `path` with `overrides` is `config` now; where it is not any more, `revision` is."""

    config: ClusterConfig
    path: Path
    overrides: Sequence[str]
    revision: Path

    def now(self) -> tuple[Path, list[str]]:
        """The file to start by: the user's own, as long as it says the same. Blocking."""
        try:
            same = load_config(self.path, self.overrides) == self.config
        except Exception:
            same = False
        return (self.path.resolve(), list(self.overrides)) if same else (self.revision, [])


class ByLauncher:
    """`kvferry up` or `kvferry serve` on this machine."""

    waits = True

    def __init__(self, cluster: str, file: FileGiven, limits: RolloutLimits) -> None:
        self._cluster, self._file, self._limits = cluster, file, limits
        self._before: dict[str, LaunchedProcess] = {}

    async def restart(self, name: str) -> None:
        """See Restarter."""
        self._before[name] = await self._look(name)
        path, overrides = await asyncio.to_thread(self._file.now)
        order = RestartOrder(name=name, file=str(path), overrides=overrides)
        try:
            reply = await ask_launcher(self._cluster, order, self._limits.launcher_s)
        except LauncherAwayError as error:
            raise RestartFailedError(str(error)) from error
        if reply.problem:
            raise RestartFailedError(reply.problem)

    async def is_up(self, name: str) -> bool | None:
        """See Restarter."""
        now, before = await self._look(name), self._before.get(name)
        is_new = before is None or now.restarts > before.restarts  # else it still says how the one of before ended
        if is_new and now.state == "died" and f"exit code {EXIT_CONFIG};" in now.said:
            raise HopelessError(f"it did not come up: {await self.why_not(name)}")
        return now.state == "ready" and (before is None or now.pid != before.pid)

    async def why_not(self, name: str) -> str:
        """See Restarter."""
        now = await self._look(name)
        lines = "\n".join(f"  | {line}" for line in now.last_lines)
        return f"{now.state}{f', {now.said}' if now.said else ''}; its last lines:\n{lines}"

    async def _look(self, name: str) -> LaunchedProcess:
        try:
            reply = await ask_launcher(self._cluster, LookOrder(), self._limits.start_s)
        except LauncherAwayError as error:
            raise RestartFailedError(str(error)) from error
        found = next((one for one in reply.processes if one.name == name), None)
        if found is None:
            raise RestartFailedError(f"the launcher on this machine has no process {name}")
        return found


class ByCommand:
    """A command of the user's, such as `ssh {host} systemctl restart kvferry-{node}`."""

    waits = True

    def __init__(
        self, template: str, file: FileGiven, plans: Mapping[str, ProcessPlan], say: Say, limits: RolloutLimits
    ) -> None:
        self._template, self._file, self._plans, self._say, self._limits = template, file, plans, say, limits

    async def restart(self, name: str) -> None:
        """See Restarter."""
        path, overrides = await asyncio.to_thread(self._file.now)
        path = self._file.revision if overrides else path  # a command takes a file alone: the one that has them
        values = {"node": name, "host": _host(self._plans[name]), "file": str(path)}
        command = self._template
        for key, value in values.items():
            command = command.replace(f"{{{key}}}", shlex.quote(value))
        self._say(f"{name}: {command}")
        child = await ChildProcess.start(["/bin/sh", "-c", command], on_line=lambda line: self._say(f"  | {line}"))
        try:
            async with asyncio.timeout(self._limits.launcher_s):
                code = await child.wait()
        except TimeoutError:
            code = -1
        finally:
            child.kill()
        if code:
            raise RestartFailedError(f"the command to restart {name} ended with {code}")

    async def is_up(self, name: str) -> bool | None:
        """See Restarter."""
        return None

    async def why_not(self, name: str) -> str:
        """See Restarter."""
        return ""


class ByHand:
    """Whoever reads what is said."""

    waits = False

    def __init__(self, plans: Mapping[str, ProcessPlan], say: Say) -> None:
        self._plans, self._say = plans, say

    async def restart(self, name: str) -> None:
        """See Restarter."""
        plan = self._plans[name]
        words = ["python" if word == sys.executable else word for word in plan.command]
        self._say(f"{name}: stop it now on {_host(plan)} (SIGTERM), and start it: {shlex.join(words)}")

    async def is_up(self, name: str) -> bool | None:
        """See Restarter."""
        return None

    async def why_not(self, name: str) -> str:
        """See Restarter."""
        return "nobody has started it anew by the new file"


def _host(plan: ProcessPlan) -> str:
    return plan.url.split("://")[1].rsplit(":", 1)[0].strip("[]")
