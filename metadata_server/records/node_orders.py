"""Drains, removals and roles of nodes as records: what was ordered before a restart of this server holds after it.

Owns the records below `drains/`, by a node's name. Invariant: once an order is answered, the records say what the
state was told by it.
"""

import asyncio
from contextlib import suppress

import msgspec

from kvcore.clock import Clock
from kvcore.errors import NotLeaderError, OverloadedError, RecordsUnavailableError
from metadata_server.cache_messages import NodeOrder, NodeOrderReply, NodeOrderRequest, NodeOrdersReply, NodeRole
from metadata_server.index.node_orders import USED
from metadata_server.index.state import MetadataState
from metadata_server.messages import LeaveRequest
from metadata_server.records.base import Guard, Records
from metadata_server.records.limits import RecordsLimits

PREFIX = "drains/"


class NodeOrdering:
    """Takes orders about nodes. `records` None: nothing is written down."""

    def __init__(
        self,
        state: MetadataState,
        clock: Clock,
        records: Records | None = None,
        limits: RecordsLimits = RecordsLimits(),
        *,
        guard: Guard | None = None,
    ) -> None:
        """`guard`: of every write."""
        self._guard = guard
        self._state = state
        self._clock = clock
        self._records = records
        self._limits = limits
        self._writing = asyncio.Lock()

    def __repr__(self) -> str:
        return repr(self._state.orders)

    async def restore(self) -> None:
        """Take up what was written down."""
        if self._records is not None:
            for record in (await self._records.listing(PREFIX)).records:
                self._state.orders.restore(msgspec.json.decode(record.value, type=NodeOrder))

    async def order(self, request: NodeOrderRequest, now: float) -> NodeOrderReply:
        """See NodeOrderRequest; once it is written down. A node that is alive and removed by force is dropped with all
        that it holds. Raises RecordsUnavailableError: it holds until this server ends, and perhaps longer."""
        live = next((node for node in self._state.nodes(now).nodes if node.id == request.node_id), None)
        reply = self._state.orders.give(request, live, self._clock.wall())
        if request.action == "remove" and live is not None and not reply.refused:
            self._state.leave(LeaveRequest(node_id=live.id, incarnation=live.incarnation), now)
        await self.write()
        return reply

    def listed(self, _: object, now: float) -> NodeOrdersReply:
        """What was ordered of nodes and not taken back."""
        self._state.tick(now)
        given = self._state.orders.all()
        roles = [NodeRole(node_id=order.node_id, role=order.role) for order in given if order.role]
        return NodeOrdersReply(orders=[order for order in given if order.kind != USED], roles=roles)

    async def run(self) -> None:
        """Write down what ended by itself, or could not be written before, until cancelled."""
        while True:
            await asyncio.sleep(self._limits.sweep_s)
            await self.sweep()

    async def sweep(self) -> None:
        """Write down what ended by itself, or could not be written before."""
        with suppress(RecordsUnavailableError, NotLeaderError, OverloadedError):
            await self.write()

    async def write(self) -> None:
        """Make the records say what the state says. Raises RecordsUnavailableError."""
        orders = self._state.orders
        if self._records is None:
            orders.unwritten.clear()
            return
        async with self._writing:  # of two orders about one node the later one's is what stays
            for node_id in sorted(orders.unwritten):
                order, name = orders.get(node_id), PREFIX + node_id
                if order is None:
                    await self._records.delete(name, guard=self._guard)
                else:
                    await self._records.put(name, msgspec.json.encode(order), guard=self._guard)
                if orders.get(node_id) == order:
                    orders.unwritten.discard(node_id)
