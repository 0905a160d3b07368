"""The commands of `kvferry nodes`: each asks the router, prints, and returns its exit code.

0: done. 1: not; why is said. 2 is a wrong command line, which raises ConfigError.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from rich.console import Console
from rich.table import Table

from kvcore.clock import SystemClock
from kvcore.trust.opening import OPEN, ClusterTrust
from kvferry.cache.client import CacheCommandError, RouterCalls, router_calls
from kvferry.cache.tables import age_text, table
from kvferry.machine import size_text
from metadata_server.cache_messages import NodeAction
from router.admin.reports import NodeOrderBody, NodeOrdered, NodeRow, NodesReport

_DONE = {
    "drain": "is drained: it gets no new requests, also when it is started again, until `kvferry nodes undrain`",
    "undrain": "is used again",
    "remove": "is forgotten",
}


@dataclass(frozen=True, slots=True)
class NodesCommands:
    """Of one router. `as_json`: one JSON value on stdout in place of tables."""

    url: str
    console: Console
    as_json: bool = False
    trust: ClusterTrust = OPEN

    def ls(self) -> int:
        """A line a node. 1: something could not be asked."""
        return self.run(self.show)

    def order(self, action: NodeAction, node: str, *, move: bool = False, force: bool = False) -> int:
        """Drain, undrain or remove a node."""
        body = NodeOrderBody(node=node, move=move, force=force)
        return self.run(lambda router: self.give(router, action, body))

    def run(self, work: Callable[[RouterCalls], Awaitable[int]]) -> int:
        """Run one of the methods below to its end."""
        try:
            return asyncio.run(self._with_calls(work))
        except CacheCommandError as error:
            sys.stderr.write(f"kvferry: error: {error}\n")
            return 1

    async def show(self, router: RouterCalls) -> int:
        """What the nodes do."""
        report = await router.get("/v1/nodes", NodesReport)
        if self.as_json:
            sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
        else:
            self.console.print(nodes_table(report.nodes, SystemClock().wall()))
        for problem in report.problems:
            sys.stderr.write(f"kvferry: {problem}\n")
        return 1 if report.problems else 0

    async def give(self, router: RouterCalls, action: NodeAction, body: NodeOrderBody) -> int:
        """One order."""
        ordered = await router.post(f"/v1/nodes/{action}", body, NodeOrdered)
        if self.as_json:
            sys.stdout.write(msgspec.json.encode(ordered).decode() + "\n")
            return 0
        lines = [f"{body.node} {_DONE[action]}"]
        if ordered.node is not None and ordered.node.state == "draining":
            lines.append(f"{ordered.node.requests} requests are under way there")
            lines += [ordered.node.why] if ordered.node.why else []
        for line in [*lines, *filter(None, [ordered.note])]:
            self.console.print(line, markup=False, soft_wrap=True)
        return 0

    async def _with_calls(self, work: Callable[[RouterCalls], Awaitable[int]]) -> int:
        async with router_calls(self.url, trust=self.trust) as router:
            return await work(router)


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
