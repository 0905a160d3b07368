"""Carries a plan out: drains, restarts, waits until the process serves and has made a token, and uses it again.

Stops at the first process that does not come up, and leaves it drained. Every step is written down before it is taken,
so whoever is cut off can go on. Owns no decision: `kvferry.rollout.plan` has those.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvcore.config.live.settings import node_settings_name
from kvcore.config.schema import ClusterConfig
from kvcore.release import release
from kvferry.cache.client import CacheCommandError, RouterCalls
from kvferry.launch.processes import ProcessKind
from kvferry.nodes.commands import wait_drained
from kvferry.rollout.limits import RolloutLimits
from kvferry.rollout.plan import RolloutPlan, RolloutStep
from kvferry.rollout.record import RecordFile, RolloutRecord
from kvferry.rollout.restarting import Restarter, RestartFailedError, Say
from router.admin.reports import NodeOrderBody, NodeOrdered, NodeRow, NodesReport, NodeTrialBody, NodeTried

WhyNot = Callable[[], Awaitable[str]]


class RolloutStoppedError(Exception):
    """A process did not come up, or could not be asked. Its text says which, and why."""


@dataclass(frozen=True, slots=True)
class RolloutSteps:
    """Of one rollout. `wanted`: the configuration that all shall go by."""

    router: RouterCalls
    restarter: Restarter
    wanted: ClusterConfig
    file: RecordFile
    record: RolloutRecord
    limits: RolloutLimits
    say: Say

    async def run(self, plan: RolloutPlan) -> None:
        """All of it. Raises RolloutStoppedError; the nodes of its batch have ended their own steps then."""
        for batch in plan.batches:
            ends = await asyncio.gather(*(self._take(step) for step in batch), return_exceptions=True)
            for end in ends:
                if isinstance(end, BaseException):
                    raise end

    async def _take(self, step: RolloutStep) -> None:
        try:
            if step.kind is ProcessKind.NODE:
                await self._roll_node(step)
            else:
                await self._roll_server(step)
        except (CacheCommandError, RestartFailedError) as error:
            raise RolloutStoppedError(f"{step.name}: {error}") from error
        self.record.done = [*self.record.done, step.name]
        self._write()

    async def _roll_server(self, step: RolloutStep) -> None:
        """A router or a metadata server. It is over when the router answers, with every node that served before."""
        try:
            served = {row.id for row in await self._rows() if row.serves}
        except CacheCommandError:  # it may be what is to be mended
            served = set()
        self.say(f"{step.name}: started anew")
        await self.restarter.restart(step.name)
        if not self.restarter.waits:
            self.say(f"{step.name}: whether it was is not looked at")
            return

        async def why_not() -> str:
            if await self.restarter.is_up(step.name) is False:
                return "it does not serve"
            left = served - {row.id for row in await self._rows() if row.serves}
            return f"not known to serve: {', '.join(sorted(left))}" if left else ""

        await self._until(step, why_not)
        self.say(f"{step.name}: serves")

    async def _roll_node(self, step: RolloutStep) -> None:
        """A node: six things, each of which an earlier run may have done."""
        before = await self._row(step.name)
        if step.resume:
            self.record.drained = sorted({*self.record.drained, step.name})
            self._write()
        if step.restart:
            if step.drain and before.state not in ("drained", "lost"):
                await self._drain(step)
            self.say(f"{step.name}: started anew" + ("" if step.drain else "; requests wait until it is back"))
            await self.restarter.restart(step.name)
        await self._until(step, lambda: self._why_not_up(step, before))
        await self._try_out(step)
        if step.resume and (await self._row(step.name)).state in ("drained", "draining"):
            await self.router.post("/v1/nodes/undrain", NodeOrderBody(node=step.name), NodeOrdered)
        await self._until(step, lambda: self._why_not_ready(step))
        self.record.drained = [name for name in self.record.drained if name != step.name]
        self.say(f"{step.name}: serves" + ("" if step.resume else ", and stays drained, as it was before"))

    async def _drain(self, step: RolloutStep) -> None:
        ordered = await self.router.post("/v1/nodes/drain", NodeOrderBody(node=step.name), NodeOrdered)
        self.say(f"{step.name}: drained" + (f" ({ordered.note})" if ordered.note else ""))
        row = await wait_drained(self.router, step.name, self.limits.drain_s, self.limits.poll_s)
        if row is not None and row.state == "draining":
            self.say(f"{step.name}: {row.requests} requests have not ended in time: they go on elsewhere")

    async def _why_not_up(self, step: RolloutStep, before: NodeRow) -> str:
        """Why this node is not the new one, serving; empty: it is."""
        if await self.restarter.is_up(step.name) is False:
            return "its process does not serve"
        now = await self._row(step.name)
        if step.restart and now.incarnation in (0, before.incarnation):
            return "it was not started anew"
        if now.settings and now.settings != node_settings_name(self.wanted, step.name):
            return "it was started by another file"
        if now.release and now.release != release():
            return f"it runs kvferry {now.release}"
        return "" if now.serves else f"the router says: {now.state}{f', {now.why}' if now.why else ''}"

    async def _why_not_ready(self, step: RolloutStep) -> str:
        row = await self._row(step.name)
        return "" if row.state == "ready" or (row.serves and not step.resume) else f"{row.state}, {row.why}"

    async def _try_out(self, step: RolloutStep) -> None:
        if (await self._row(step.name)).role == "store":
            return
        problem = ""
        for _ in range(self.limits.trials):
            body = NodeTrialBody(node=step.name, timeout_s=self.limits.trial_s)
            problem = (await self.router.post("/v1/nodes/try", body, NodeTried)).problem
            if not problem:
                return
            await asyncio.sleep(self.limits.poll_s)
        raise RolloutStoppedError(f"{step.name} serves, and made no token when it was tried out: {problem}")

    async def _until(self, step: RolloutStep, why_not: WhyNot) -> None:
        """Wait until there is no reason. A router that cannot be asked is one: it may be the one that is started."""
        loop = asyncio.get_running_loop()
        ends, why = loop.time() + self.limits.start_s, ""
        while True:
            try:
                if not (why := await why_not()):
                    return
            except CacheCommandError as error:
                why = str(error)
            if loop.time() >= ends:
                known = await self.restarter.why_not(step.name)
                raise RolloutStoppedError(
                    f"{step.name} did not come up in {self.limits.start_s:g} s: {why}{f'; {known}' if known else ''}"
                )
            await asyncio.sleep(self.limits.poll_s)

    async def _rows(self) -> list[NodeRow]:
        report = await self.router.get("/v1/nodes", NodesReport)
        if report.problems:
            raise CacheCommandError("; ".join(report.problems))
        return report.nodes

    async def _row(self, name: str) -> NodeRow:
        rows = (await self.router.get("/v1/nodes", NodesReport)).nodes
        return next((row for row in rows if row.id == name), NodeRow(id=name, state="lost", why="nobody knows it"))

    def _write(self) -> None:
        self.file.write(self.record)
