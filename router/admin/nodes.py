"""The nodes for operators: what each is doing and since when, and the orders that they are given.

Orders are the metadata server's, so that they outlive every router; this router follows them at once, others when they
ask next (`follow`). What it was last told holds while that server is away.
"""

import asyncio
import difflib
import logging
from collections.abc import Awaitable, Callable

from kvcore.clock import Clock
from kvcore.errors import InvalidRequestError, MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from kvcore.types import NodeInfo, Role
from metadata_server.account_messages import Stats
from metadata_server.cache_messages import NODE_ORDERS, NODE_ROLES, NodeAction, NodeOrder, NodeOrderRequest
from metadata_server.client import MetadataClient
from router.admin.rebalance import check_speaks
from router.admin.reports import NodeOrderBody, NodeOrdered, NodeRow, NodesReport, NodeTrialBody, NodeTried
from router.admin.states import LOST, REFUSED, node_state, num_requests, serves
from router.nodes.cluster import Cluster, KnownNode

_log = logging.getLogger("router")


class NodeAdmin:
    """`probe` asks all nodes for their reports, `trial` has one make a token and says why it did not; `connected`:
    whether the metadata server's events come."""

    def __init__(
        self,
        cluster: Cluster,
        metadata: MetadataClient,
        clock: Clock,
        *,
        probe: Callable[[], Awaitable[None]],
        trial: Callable[[KnownNode, float], Awaitable[str]],
        connected: Callable[[], bool],
    ) -> None:
        self._cluster, self._metadata, self._clock = cluster, metadata, clock
        self._probe, self._trial, self._connected = probe, trial, connected
        self._orders: dict[str, NodeOrder] = {}
        self._roles: dict[str, str] = {}
        self._since: dict[str, tuple[str, float]] = {}
        """Node -> its state, and since when (Unix seconds)."""

    def __repr__(self) -> str:
        return f"<NodeAdmin {len(self._orders)} orders>"

    # --- following ---------------------------------------------------------------------------------------------------

    async def follow(self, interval_s: float = 1.0) -> None:
        """Keep to what was ordered, through whatever router, until cancelled."""
        while True:
            try:
                await self._take_orders()
            except (MetadataUnavailableError, MetadataProtocolError) as error:  # what was last said holds
                log_fields(_log, logging.DEBUG, "no_node_orders", error=error.message)
            await asyncio.sleep(interval_s)

    def note_states(self) -> None:
        """Remember since when each node has been in its state. For every round of probes."""
        wall = self._clock.wall()
        self._since = {
            node.id: self._since[node.id] if self._since.get(node.id, ("", 0.0))[0] == state else (state, wall)
            for node in self._cluster.nodes.values()
            for state, _ in [self._state(node)]
        }

    async def _take_orders(self) -> None:
        given = await self._metadata.node_orders()
        self._orders = {order.node_id: order for order in given.orders}
        self._roles = {one.node_id: one.role for one in given.roles}
        known = {role.value: role for role in (Role.PREFILLER, Role.DECODER)}
        roles = {name: known[role] for name, role in self._roles.items() if role in known}
        self._cluster.on_orders(given.orders, roles)

    # --- looking -----------------------------------------------------------------------------------------------------

    async def report(self) -> NodesReport:
        """All nodes, those that this router knows, those that are refused, and those that are drained and away."""
        problems: list[str] = []
        stats: Stats | None = None
        try:
            await self._take_orders()
            stats = await self._metadata.stats()
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            problems.append(f"metadata server: {error.message}")
        self.note_states()
        rows = {node.id: self._row(node, stats) for node in self._cluster.nodes.values()}
        for refused in stats.refused if stats is not None else ():
            node = refused.node
            if node.id not in rows or rows[node.id].state == LOST:
                rows[node.id] = self._refused_row(node, refused.reason)
        for order in self._orders.values():
            if order.kind == "drained" and order.node_id not in rows:
                why = "it is drained, and nobody knows where it is"
                rows[order.node_id] = NodeRow(id=order.node_id, state=LOST, why=why, since=order.since)
        return NodesReport(nodes=[rows[name] for name in sorted(rows)], problems=problems)

    def _state(self, node: KnownNode) -> tuple[str, str]:
        order = self._orders.get(node.id)
        drained = self._cluster.is_drained(node.id)
        move = order is not None and order.move
        return node_state(node, drained=drained, move=move, index_known=self._connected())

    def _row(self, node: KnownNode, stats: Stats | None) -> NodeRow:
        state, why = self._state(node)
        report, order = node.report, self._orders.get(node.id)
        segments = [one for one in stats.segments if one.segment.node_id == node.id] if stats is not None else []
        sizes = [one.segment for one in segments] or (report.segments if report is not None else [])
        drained = order is not None and self._cluster.is_drained(node.id)
        return NodeRow(
            id=node.id,
            role=node.role.value,
            ordered_role=self._roles.get(node.id, ""),
            state=state,
            why=why,
            since=order.since if order is not None and drained and state != LOST else self._since[node.id][1],
            used_bytes=sum(one.used_bytes for one in segments) if stats is not None else None,
            size_bytes=sum(segment.size_bytes for segment in sizes),
            requests=num_requests(node) if report is not None and node.silent_since is None else None,
            release=report.release if report is not None else "",
            weights=report.version if report is not None else "",
            url=node.url,
            incarnation=report.node.incarnation if report is not None else 0,
            settings=report.settings if report is not None else "",
            serves=serves(node, index_known=self._connected()),
        )

    def _refused_row(self, node: NodeInfo, why: str) -> NodeRow:
        return NodeRow(id=node.id, role=node.role.value, state=REFUSED, why=why, url=node.control_url)

    # --- orders ------------------------------------------------------------------------------------------------------

    async def order(self, action: NodeAction, body: NodeOrderBody) -> NodeOrdered:
        """Carry one out. Raises InvalidRequestError for a node that nobody knows, or where it is refused, and
        MetadataUnavailableError: it may be carried out or not."""
        await check_speaks(self._metadata, NODE_ROLES if action == "role" else NODE_ORDERS)
        await self._take_orders()
        self._check_known(body.node)
        node = self._cluster.nodes.get(body.node)
        start = node.report.node.incarnation if node is not None and node.report is not None else 0
        reply = await self._metadata.order_node(
            NodeOrderRequest(
                node_id=body.node, action=action, move=body.move, force=body.force, incarnation=start, role=body.role
            )
        )
        if reply.refused:
            raise InvalidRequestError(reply.refused, param="node")
        await self._take_orders()
        await self._probe()
        rows = (await self.report()).nodes
        return NodeOrdered(node=next((row for row in rows if row.id == body.node), None), note=self._note(node))

    async def try_out(self, body: NodeTrialBody) -> NodeTried:
        """Have it make a token. Raises InvalidRequestError for a node that nobody knows or that has no engine."""
        self._check_known(body.node)
        node = self._cluster.nodes.get(body.node)
        if node is None:
            return NodeTried(problem="nobody knows where it is")
        if node.role is Role.STORE:
            raise InvalidRequestError(f"node {node.id} has no engine: its role is store", param="node")
        return NodeTried(problem=await self._trial(node, body.timeout_s))

    def _check_known(self, name: str) -> None:
        known = {*self._cluster.nodes, *self._orders}
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)[:8]
            raise InvalidRequestError(f"there is no node {name}: known are {', '.join(near)}", param="node")

    def _note(self, node: KnownNode | None) -> str:
        view = self._cluster.view()
        if node is None or node.role is Role.STORE or not self._cluster.is_drained(node.id):
            return ""
        if not (view.decoders or view.prefillers):
            return "no other node can be used: no request is answered until one can"
        if node.role is Role.PREFILLER:
            return "" if view.prefillers else "no other prefiller can be used: decoders compute prompts by themselves"
        return "" if view.decoders else "no other decoder can be used: prefillers decode"
