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
        """The exit code. 0: it serves so, or is drained as it was before. 1: it has not taken the role in time."""
        before = await self._row(router)
        if before.role == self.role and before.state not in ("draining", "drained"):
            self._say(f"{self.node} serves as a {self.role} already")
            return self._end(before, 0)
        if own := before.state not in ("draining", "drained"):
            await self._order(router, "drain", NodeOrderBody(node=self.node))
        row = await wait_drained(router, self.node, self.wait_s, self.commands.poll_s) or before
        left = f"; {row.requests} requests go on there" if row.state == "draining" else ""
        self._say(f"{self.node} is drained{left}")
        await self._order(router, "role", NodeOrderBody(node=self.node, role=self.role))
        row, problem = await self._until_taken(router)
        if problem:
            why = f"has not taken the role in {self.take_s:g} s: {problem}; it stays drained"
            sys.stderr.write(f"kvferry: {self.node} {why}\n")
            return self._end(row, 1)
        if not own:
            self._say(f"{self.node} is a {self.role} now, and stays drained, as it was: `kvferry resume {self.node}`")
            return self._end(row, 0)
        row = (await self._order(router, "undrain", NodeOrderBody(node=self.node))).node or row
        self._say(f"{self.node} serves as a {self.role}, whatever its file says: write it there, too")
        return self._end(row, 0)

    async def _until_taken(self, router: RouterCalls) -> tuple[NodeRow, str]:
        loop = asyncio.get_running_loop()
        ends = loop.time() + self.take_s
        while True:
            row = await self._row(router)
            if row.role == self.role and row.serves:
                return row, ""
            if loop.time() >= ends:
                return row, f"{row.state}{f', {row.why}' if row.why else ''}"
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
