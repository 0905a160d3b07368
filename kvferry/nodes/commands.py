"""The commands of `kvferry nodes`: each asks the router, prints, and returns its exit code.

0: done. 1: not; why is said. 130: Ctrl-C. 2 is a wrong command line, which raises ConfigError.
"""

import asyncio
import sys
from dataclasses import dataclass

from rich.table import Table

from kvcore.clock import SystemClock
from kvferry.cache.asking import AskingCommands
from kvferry.cache.client import RouterCalls
from kvferry.cache.tables import age_text, table
from kvferry.machine import size_text
from metadata_server.cache_messages import NodeAction
from router.admin.reports import NodeOrderBody, NodeOrdered, NodeRow, NodesReport

_DONE = {
    "drain": "is drained: it gets no new requests, also when it is started again, until `kvferry resume`",
    "undrain": "is used again",
    "remove": "is forgotten",
}


@dataclass(frozen=True, slots=True)
class NodesCommands(AskingCommands):
    """Of one router."""

    poll_s: float = 0.5

    def ls(self) -> int:
        """A line a node. 1: something could not be asked."""
        return self.run(self.show)

    def order(
        self, action: NodeAction, node: str, *, move: bool = False, force: bool = False, wait_s: float = 0.0
    ) -> int:
        """Drain, undrain or remove a node. `wait_s`: wait so long until a drained one has nothing to do."""
        body = NodeOrderBody(node=node, move=move, force=force)
        return self.run(lambda router: self.give(router, action, body, wait_s=wait_s))

    async def show(self, router: RouterCalls) -> int:
        """What the nodes do."""
        report = await router.get("/v1/nodes", NodesReport)
        if not self._printed(report):
            self.console.print(nodes_table(report.nodes, SystemClock().wall()))
        for problem in report.problems:
            sys.stderr.write(f"kvferry: {problem}\n")
        return 1 if report.problems else 0

    async def give(self, router: RouterCalls, action: NodeAction, body: NodeOrderBody, *, wait_s: float = 0.0) -> int:
        """One order. 1: after `wait_s` the node that it drained still has something to do."""
        ordered = await router.post(f"/v1/nodes/{action}", body, NodeOrdered)
        if wait_s and ordered.node is not None:
            ordered.node = await wait_drained(router, body.node, wait_s, self.poll_s) or ordered.node
        if self._printed(ordered):
            return _code(ordered, wait_s)
        lines = [f"{body.node} {_DONE[action]}"]
        if ordered.node is not None and ordered.node.state == "draining":
            lines.append(f"{ordered.node.requests} requests are under way there")
            lines += [ordered.node.why] if ordered.node.why else []
        for line in [*lines, *filter(None, [ordered.note])]:
            self.console.print(line, markup=False, soft_wrap=True)
        return _code(ordered, wait_s)


async def wait_drained(router: RouterCalls, name: str, wait_s: float, poll_s: float) -> NodeRow | None:
    """The node as it is when nothing is under way there, or it is lost, or `wait_s` has passed."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + wait_s
    while True:
        rows = (await router.get("/v1/nodes", NodesReport)).nodes
        row = next((row for row in rows if row.id == name), None)
        if row is None or row.state != "draining" or loop.time() >= ends:
            return row
        await asyncio.sleep(poll_s)


def _code(ordered: NodeOrdered, wait_s: float) -> int:
    return 1 if wait_s and ordered.node is not None and ordered.node.state == "draining" else 0


def nodes_table(rows: list[NodeRow], now: float) -> Table:
    """A row a node. `now`: Unix seconds."""
    made = table("node", "role", "state", "for", "segment", "requests", "version", "why")
    for row in rows:
        age = "" if row.since is None else age_text(now - row.since)
        version = f"{row.release} {row.weights}".strip()
        requests = "" if row.requests is None else str(row.requests)
        made.add_row(row.id, row.role, row.state, age, _fill(row), requests, version, row.why)
    return made


def _fill(row: NodeRow) -> str:
    if row.used_bytes is None or not row.size_bytes:
        return ""
    return f"{size_text(row.used_bytes)} of {size_text(row.size_bytes)} ({row.used_bytes / row.size_bytes:.0%})"
