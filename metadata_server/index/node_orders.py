"""What operators ordered of nodes: which are drained, which were removed, and as what they serve. Pure.

Owns the orders and which of them are not written down yet. Invariants: a node has one order at most; a drain and a role
hold for every start of their node; a removal ends when another start of the node joins.
"""

import msgspec

from kvcore.errors import NodeRefusedError
from kvcore.types import NodeInfo, Role
from metadata_server.cache_messages import NodeOrder, NodeOrderReply, NodeOrderRequest
from metadata_server.index.limits import IndexLimits

DRAINED = "drained"
REMOVED = "removed"
USED = "used"


class NodeOrders:
    """Mutated by MetadataState, and once, at start, by who reads the records."""

    def __init__(self, limits: IndexLimits) -> None:
        self._orders: dict[str, NodeOrder] = {}
        self._limits = limits
        self.drained: set[str] = set()
        self.unwritten: set[str] = set()
        """Nodes of which the records say something else."""

    def __repr__(self) -> str:
        return f"<NodeOrders of {len(self._orders)} nodes, {len(self.drained)} drained>"

    def restore(self, order: NodeOrder) -> None:
        """As it was written down."""
        self._set(order.node_id, order)
        self.unwritten.discard(order.node_id)

    def get(self, node_id: str) -> NodeOrder | None:
        """What was ordered of the node."""
        return self._orders.get(node_id)

    def all(self) -> list[NodeOrder]:
        """By name."""
        return [order for _, order in sorted(self._orders.items())]

    def drain_of(self, node_id: str) -> str:
        """`stay` or `move` of a drained node, else empty."""
        return "" if node_id not in self.drained else "move" if self._orders[node_id].move else "stay"

    def role_of(self, node_id: str) -> str:
        """As what the node is to serve; empty: as its file says."""
        order = self._orders.get(node_id)
        return "" if order is None else order.role

    def give(self, request: NodeOrderRequest, live: NodeInfo | None, wall: float) -> NodeOrderReply:
        """Take an order. `live`: the node, if it has a lease; a `remove` that is not refused is to end it."""
        before = self._orders.get(request.node_id)
        refused = self._why_refused(request, live, before)
        if refused:
            return NodeOrderReply(order=before, refused=refused)
        role = before.role if before is not None and request.action != "remove" else ""
        if request.action == "role" and request.role is not msgspec.UNSET:
            order = before or NodeOrder(node_id=request.node_id, kind=USED, since=wall)
            return self._given(msgspec.structs.replace(order, role=request.role))
        if request.action == "undrain":
            if role:
                return self._given(NodeOrder(node_id=request.node_id, kind=USED, since=wall, role=role))
            self._set(request.node_id, None)
            return NodeOrderReply()
        kind = DRAINED if request.action == "drain" else REMOVED
        since = before.since if before is not None and before.kind == kind else wall
        incarnation = 0 if kind == DRAINED else live.incarnation if live is not None else request.incarnation
        order = NodeOrder(node_id=request.node_id, kind=kind, since=since, move=request.move, incarnation=incarnation)
        return self._given(msgspec.structs.replace(order, role=role))

    def _given(self, order: NodeOrder) -> NodeOrderReply:
        self._set(order.node_id, order)
        return NodeOrderReply(order=order)

    def check_joins(self, info: NodeInfo) -> None:
        """Raise NodeRefusedError for the start of a node that was removed."""
        order = self._orders.get(info.id)
        if order is not None and order.kind == REMOVED and order.incarnation == info.incarnation:
            raise NodeRefusedError(
                f"node {info.id} was removed: it is taken in when it is started anew, or after "
                f"`kvferry resume {info.id}`",
                param="node.id",
            )

    def joined(self, info: NodeInfo) -> None:
        """It was taken in: if it had been removed, it is a new node."""
        order = self._orders.get(info.id)
        if order is not None and order.kind == REMOVED:
            self._set(info.id, None)

    def drop(self, order: NodeOrder) -> bool:
        """End an order, if it is still this one."""
        if self._orders.get(order.node_id) != order:
            return False
        self._set(order.node_id, None)
        return True

    def _why_refused(self, request: NodeOrderRequest, live: NodeInfo | None, before: NodeOrder | None) -> str:
        name = request.node_id
        if request.action == "remove" and live is not None and not request.force:
            return f"node {name} is alive at {live.control_url}: stop it and wait for its lease to end, or give --force"
        if request.action == "role" and live is not None and live.role is Role.STORE:
            return f"node {name} has no engine: its role is store"
        if request.action == "role" and request.role is msgspec.UNSET:
            return "as what is it to serve? The order names no role"
        if request.action in ("drain", "role") and before is not None and before.kind == REMOVED:
            return f"node {name} was removed: `kvferry resume {name}` takes it back"
        if request.action == "undrain" and (before is None or before.kind == USED):
            return f"node {name} is neither drained nor removed"
        if request.action != "undrain" and before is None and len(self._orders) >= self._limits.max_node_orders:
            return f"{self._limits.max_node_orders} nodes are drained or removed, or have another role, already"
        return ""

    def _set(self, node_id: str, order: NodeOrder | None) -> None:
        if order is None:
            del self._orders[node_id]
        else:
            self._orders[node_id] = order
        if order is not None and order.kind == DRAINED:
            self.drained.add(node_id)
        else:
            self.drained.discard(node_id)
        self.unwritten.add(node_id)
