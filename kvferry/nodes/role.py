"""`kvferry role`: a running node serves as the other role, and no request is lost.

Three orders, each of which holds by itself: drain it, tell it its role, use it again. Begun again it goes on.
"""

import asyncio
import sys
from dataclasses import dataclass
from typing import Literal

import msgspec

from kvferry.cache.client import CacheCommandError, RouterCalls
from kvferry.nodes.commands import NodesCommands, wait_drained
from router.admin.reports import NodeOrderBody, NodeOrdered, NodeRow, NodesReport


@dataclass(frozen=True, slots=True)
class RoleCommand:
    """For one node. `wait_s`: what runs there has so long to end; `take_s`: the node so long to take the role, which it
    hears of with its next heartbeat."""

    commands: NodesCommands
    node: str
    role: Literal["prefiller", "decoder"]
    wait_s: float
    take_s: float = 60.0

    async def change(self, router: RouterCalls) -> int:
        """The exit code. 0: it serves so, or is drained as it was before. 1: it has not taken the role in time, or was
        told another one meanwhile: whoever told it the last goes on."""
        before = await self._row(router)
        if before.role == self.role and not _is_drained(before):
            self._say(f"{self.node} serves as a {self.role} already")
            return self._end(before, 0)
        if own := not _is_drained(before):
            await self._order(router, "drain", NodeOrderBody(node=self.node))
        row = await wait_drained(router, self.node, self.wait_s, self.commands.poll_s) or before
        left = f"; {row.requests} requests go on there" if row.state == "draining" else ""
        self._say(f"{self.node} is drained{left}")
        await self._order(router, "role", NodeOrderBody(node=self.node, role=self.role))
        row, problem = await self._until_taken(router)
        if problem:
            stays = f"; it stays drained: `kvferry resume {self.node}`" if own and row.state != "ready" else ""
            sys.stderr.write(f"kvferry: {self.node} {problem}{stays}\n")
            return self._end(row, 1)
        if not own and _is_drained(row):
            until = f"until whoever drained it resumes it: `kvferry resume {self.node}`"
            self._say(f"{self.node} is a {self.role} now, and stays drained, as it was, {until}")
            return self._end(row, 0)
        if own:
            row = (await self._order(router, "undrain", NodeOrderBody(node=self.node))).node or row
        self._say(f"{self.node} serves as a {self.role}, whatever its file says: write it there, too")
        return self._end(row, 0)

    async def _until_taken(self, router: RouterCalls) -> tuple[NodeRow, str]:
        loop = asyncio.get_running_loop()
        ends = loop.time() + self.take_s
        while True:
            row = await self._row(router)
            if row.ordered_role not in ("", self.role):
                return row, f"was told to serve as a {row.ordered_role} meanwhile, and not as a {self.role} any more"
            if row.role == self.role and row.serves:
                return row, ""
            if loop.time() >= ends:
                why = f"{row.state}{f', {row.why}' if row.why else ''}"
                return row, f"has not taken the role in {self.take_s:g} s: {why}"
            await asyncio.sleep(self.commands.poll_s)

    async def _row(self, router: RouterCalls) -> NodeRow:
        rows = (await router.get("/v1/nodes", NodesReport)).nodes
        if (found := next((row for row in rows if row.id == self.node), None)) is None:
            raise CacheCommandError(f"there is no node {self.node}: known are {', '.join(row.id for row in rows)}")
        return found

    async def _order(self, router: RouterCalls, action: str, body: NodeOrderBody) -> NodeOrdered:
        return await router.post(f"/v1/nodes/{action}", body, NodeOrdered)

    def _say(self, line: str) -> None:
        if not self.commands.as_json:
            self.commands.console.print(line, markup=False, soft_wrap=True)

    def _end(self, row: NodeRow, code: int) -> int:
        if self.commands.as_json:
            sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
        return code


def _is_drained(row: NodeRow) -> bool:
    return row.state in ("draining", "drained")
