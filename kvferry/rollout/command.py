"""`kvferry rollout`: looks at what runs, says what will change, carries it out or goes on with what was cut off.

Exit codes: 0 every process goes by the file; 1 it was stopped, why is said; 130 interrupted. What cannot be rolled at
all raises ConfigError.
"""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.release import release
from kvcore.trust.opening import ClusterTrust
from kvcore.types import Role
from kvferry.cache.client import CacheCommandError, RouterCalls, router_calls
from kvferry.launch.control import LauncherAwayError, LauncherReply, LookOrder, ask_launcher, revision_file
from kvferry.launch.processes import ProcessKind, ProcessPlan, plan_processes
from kvferry.rollout.limits import RolloutLimits
from kvferry.rollout.plan import ProcessSeen, RolloutPlan, plan_rollout
from kvferry.rollout.record import RecordFile, RolloutRecord, as_path
from kvferry.rollout.restarting import ByCommand, ByHand, ByLauncher, FileGiven, Restarter
from kvferry.rollout.steps import RolloutSteps, RolloutStoppedError
from router.admin.reports import NodeRow, NodesReport

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class RolloutOptions:
    """What the command line asks for. `running`: the file by which the cluster runs, where no launcher knows it;
    `restart`: the command that starts a process anew; `again`: all of them, whether or not something changes."""

    file: Path
    overrides: Sequence[str]
    running: Path | None
    url: str
    trust: ClusterTrust
    limits: RolloutLimits
    at_once: int = 1
    back: bool = False
    dry_run: bool = False
    restart: str = ""
    again: bool = False


class RolloutCommand:
    """One run of the command."""

    def __init__(self, options: RolloutOptions, console: Console) -> None:
        self._options, self._console = options, console

    def run(self) -> int:
        """To its end. Raises ConfigError."""
        try:
            return asyncio.run(self.roll())
        except KeyboardInterrupt:
            return INTERRUPTED
        except CacheCommandError as error:
            sys.stderr.write(f"kvferry: error: {error}\n")
            return 1

    async def roll(self) -> int:
        """The same, on a loop. Cancelled it says what is left."""
        wanted = load_config(self._options.file, self._options.overrides)
        record_file = RecordFile(wanted.cluster)
        with record_file.alone():
            async with router_calls(self._options.url, trust=self._options.trust) as router:
                return await self._roll(router, wanted, record_file)

    async def _roll(self, router: RouterCalls, wanted: ClusterConfig, record_file: RecordFile) -> int:
        options, last = self._options, record_file.read()
        launched = await _launched(wanted.cluster)
        old, file = self._files(wanted, launched, last)
        record = _record(options, wanted.cluster, file, old, last)
        seen = await _look(router, file.config, launched, record)
        again = frozenset({one.name for one in seen} - set(record.done)) if options.again else frozenset[str]()
        own = frozenset(record.drained)
        plan = plan_rollout(
            old, file.config, seen, at_once=options.at_once, release=release(), own_drains=own, again=again
        )
        refused = [*plan.refused, *_other_tokenizer(old, file.config)]
        if refused:
            raise ConfigError("\n  ".join(["this cannot be rolled out:", *refused]))
        self._show(plan, last)
        if options.dry_run or (not plan.steps and (last is None or last.finished)):
            return 0
        plans = {one.name: one for one in plan_processes(file.config, file.revision)}
        restarter = self._restarter(wanted.cluster, file, plans, launched is not None)
        steps = RolloutSteps(router, restarter, file.config, record_file, record, options.limits, self._say)
        return await self._carry_out(steps, plan)

    async def _carry_out(self, steps: RolloutSteps, plan: RolloutPlan) -> int:
        record, file = steps.record, steps.file
        file.write(record)
        try:
            await steps.run(plan)
        except RolloutStoppedError as error:
            record.stopped = str(error).splitlines()[0]
            self._left(record, str(error))
            return 1
        except asyncio.CancelledError:
            record.stopped = "it was interrupted"
            self._left(record, "interrupted")
            raise
        finally:
            file.write(record)
        record.finished, record.stopped, record.drained = True, "", []
        if record.back:
            file.remove()
        else:
            file.write(record)
        self._say("every process goes by " + (record.target if record.back else record.file))
        return 0

    def _files(
        self, wanted: ClusterConfig, launched: LauncherReply | None, last: RolloutRecord | None
    ) -> tuple[ClusterConfig, FileGiven]:
        """What the cluster went by before, and what it shall go by. Raises ConfigError where nobody knows the first."""
        options, cluster = self._options, wanted.cluster
        going = last if last is not None and not last.finished else None
        if options.back:
            if last is None:
                raise ConfigError("there is nothing to go back to: no rollout was begun from this machine")
            target = as_path(last.before)
            old = load_config(as_path(last.target if not last.back else last.before))
            return old, FileGiven(load_config(target), target, (), target)
        if going is not None:
            old = load_config(as_path(going.before))
        elif launched is not None:
            files = [one.file for one in launched.processes if one.kind == ProcessKind.NODE]
            old = load_config(as_path((files or [one.file for one in launched.processes])[0]))
        elif options.running is not None:
            old = load_config(options.running)
        else:
            raise ConfigError(
                f"no `kvferry up` of cluster {cluster} runs on this machine: --config says by which file the cluster "
                "runs now"
            )
        return old, FileGiven(wanted, options.file, options.overrides, revision_file(cluster, wanted))

    def _restarter(self, cluster: str, file: FileGiven, plans: dict[str, ProcessPlan], is_launched: bool) -> Restarter:
        if self._options.restart:
            return ByCommand(self._options.restart, file, plans, self._say, self._options.limits)
        return ByLauncher(cluster, file, self._options.limits) if is_launched else ByHand(plans, self._say)

    def _show(self, plan: RolloutPlan, last: RolloutRecord | None) -> None:
        if last is not None and not last.finished:
            self._say(f"{last.what} was not finished; this goes on from where it is")
        for step in plan.steps:
            self._say(f"{step.name}: {'; '.join(step.changes)}")
        for note in plan.notes:
            self._say(note)
        if not plan.steps:
            self._say("nothing changes for any process")

    def _left(self, record: RolloutRecord, why: str) -> None:
        lines = [f"stopped: {why}"]
        if record.drained:
            lines.append(f"drained by this rollout, and not used until it goes on: {', '.join(record.drained)}")
        again = f"kvferry rollout {record.file}" + " --back" * record.back
        lines.append(f"`{again}` goes on" + ("" if record.back else f"; `{again} --back` returns to what was"))
        for line in lines:
            sys.stderr.write(f"kvferry: {line}\n")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


async def _launched(cluster: str) -> LauncherReply | None:
    try:
        return await ask_launcher(cluster, LookOrder(), 10.0)
    except LauncherAwayError:
        return None


async def _look(
    router: RouterCalls, wanted: ClusterConfig, launched: LauncherReply | None, record: RolloutRecord
) -> list[ProcessSeen]:
    """All processes, as they are now. A router that is away is mended by the launcher, if that knows one; else it
    raises CacheCommandError."""
    by_name = {one.name: one for one in launched.processes} if launched is not None else {}
    try:
        rows = {row.id: row for row in (await router.get("/v1/nodes", NodesReport)).nodes}
    except CacheCommandError:
        if not by_name:
            raise
        rows = {}
    seen = []
    for plan in plan_processes(wanted, Path()):
        known = by_name.get(plan.name)
        config, up = (load_config(known.file), known.state == "ready") if known is not None else (None, not rows)
        if plan.kind is not ProcessKind.NODE:
            if known is not None or launched is None:
                seen.append(ProcessSeen(plan.name, plan.kind, config, serves=up))
            continue
        lost = NodeRow(id=plan.name, state="drained" if plan.name in record.drained else "lost", serves=up and not rows)
        row = rows.get(plan.name, lost)
        drained, role = row.state in ("drained", "draining"), Role(row.role or wanted.nodes[plan.name].role)
        seen.append(
            ProcessSeen(plan.name, plan.kind, config, row.settings, row.release, role, drained, serves=row.serves)
        )
    return seen


def _record(
    options: RolloutOptions, cluster: str, file: FileGiven, old: ClusterConfig, last: RolloutRecord | None
) -> RolloutRecord:
    going = last if last is not None and not last.finished else None
    target = str(file.revision)
    same = going is not None and going.target == target
    before = last.before if options.back and last is not None else going.before if going is not None else None
    return RolloutRecord(
        cluster=cluster,
        file=str(options.file),
        before=before or str(revision_file(cluster, old)),
        target=target,
        back=options.back,
        drained=list(going.drained) if going is not None else [],
        done=list(going.done) if same and going is not None else [],
    )


def _other_tokenizer(old: ClusterConfig, new: ClusterConfig) -> list[str]:
    """Blocking; says nothing of a model that is not on this machine."""
    before, after = Path(old.model.path), Path(new.model.path)
    one, other = before / "tokenizer.json", after / "tokenizer.json"
    if one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes():
        return [f"model.path: {other} is not {one}, and a router has one tokenizer: bring a second cluster up"]
    return []
